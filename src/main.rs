//! argv → cli → exit code.

use std::process::ExitCode;

fn main() -> ExitCode {
    pdlink::cli::main(std::env::args_os())
}
