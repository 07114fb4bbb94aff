//! Weights from a trainer, or from a checkpoint, into workers that serve.
//!
//! - *what is sent*: `manifest` (names, dtypes, shapes, and the stream that their bytes make), `digest`, `tensors` (where
//!   bytes come from), `checkpoint` (one such place: safetensors on disk), `gathered` (another: tensors that come while they are sent);
//! - *how it comes*: `messages` over a control connection, `ring`, `source` and `sender` on the sending side, `pull` and `stage` on the
//!   receiving one, `room` for it in memory, `staged` is what came of it, or a `stream` that an engine takes as it comes; `prime_rl`, the stream of a
//!   trainer that knows nothing of us;
//! - *when it serves*: `session`, one worker's part in an update as a pure machine, and `receiver`, the thread that owns it;
//!   `listening`, the way to it where there is no KV runtime.
//!
//! The fleet's transaction is the proxy's, which speaks `control::weights` with every worker. Bytes are pulled by the workers
//! over the paths of `transport`, so that a path between GPUs would change `Paths` and nothing above it.
//!
//! Invariants WT-1 to WT-5 are stated in `docs/architecture.md`.
#![forbid(unsafe_code)]

mod casts;
mod checkpoint;
mod digest;
mod gathered;
mod listening;
mod manifest;
mod messages;
mod metrics;
mod paths;
mod prime_rl;
mod pull;
mod receiver;
mod ring;
mod room;
mod seating;
mod sender;
mod session;
mod slots;
mod source;
mod stage;
mod staged;
mod stream;
mod tensors;
#[cfg(test)]
mod testing;

pub use casts::Casts;
pub use checkpoint::{Checkpoint, CheckpointError};
pub use digest::{TensorDigest, WeightsDigest};
pub use gathered::{Due, Gathered, GiveError};
pub use listening::Listening;
pub use manifest::{Dtype, Manifest, ManifestError, Tensor};
pub use metrics::WeightsMetrics;
pub use paths::{Paths, WrapPath};
pub use receiver::{NewWeights, ReceiverSetup, WeightTarget, WeightsHandle, WeightsReceiver};
pub use sender::{Sender, SenderError};
pub use source::{Progress, Running, Source, SourceError};
pub use stage::{StageError, digest_of_folder};
pub use staged::Staged;
pub use stream::{Arrived, Stream};
pub use tensors::{ReadError, TensorBytes};
