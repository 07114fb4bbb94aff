//! What is known of vLLM before it serves, and from its log: the program and its environment, its start, its failure.

pub mod diagnosis;
pub mod program;
pub mod progress;
