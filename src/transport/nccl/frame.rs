//! What the two ends of a link say to each other over their connection. The bytes themselves go by NCCL.
//!
//! A message is its length and its postcard form; every length is checked against a bound before anything is read for it.
#![forbid(unsafe_code)]

use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

use crate::transport::wire::{Patience, Socket};
use crate::transport::{End, GrantToken, TransportError};

/// Most runs of one request.
pub(super) const REQUEST_RUNS_MAX: usize = 8192;
/// Longest message: a request of so many runs, of up to 21 bytes each.
const MESSAGE_BYTES_MAX: u32 = 192 << 10;

/// The first message, from who connected: the name of the communicator that both make now.
#[derive(Debug, Serialize, Deserialize)]
pub(super) struct Hello {
    pub(super) communicator: Vec<u8>,
    /// Bytes of a staging buffer, there.
    pub(super) buffer_bytes: u64,
}

/// The answer to it.
#[derive(Debug, Serialize, Deserialize)]
pub(super) struct Welcome {
    pub(super) buffer_bytes: u64,
}

/// Bytes of one region of the side that is asked.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Stretch {
    pub(super) region: u16,
    pub(super) offset: u64,
    pub(super) len: u64,
}

/// What the side that owns the memory is asked.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(super) enum Request {
    /// To send these bytes, which are being received already. There is no answer but the bytes.
    Read { stretches: Vec<Stretch> },
    /// To receive bytes for these places, which are sent once it says that it does.
    Write { sequence: u64, grant: [u8; 16], stretches: Vec<Stretch> },
}

/// What it answers to a [`Request::Write`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Answer {
    pub(super) sequence: u64,
    pub(super) says: Says,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub(super) enum Says {
    /// It receives: send.
    Receiving,
    /// Everything is in its place.
    Done,
    UnknownRegion {
        region: u16,
        regions: u32,
    },
    OutOfRange {
        region: u16,
        offset: u64,
        len: u64,
        region_len: u64,
    },
    NotGranted {
        region: u16,
        offset: u64,
        len: u64,
    },
}

impl Says {
    /// How the request ended, unless it goes on.
    pub(super) fn result(self) -> Option<Result<(), TransportError>> {
        let end = End::Destination;
        Some(match self {
            Self::Receiving => return None,
            Self::Done => Ok(()),
            Self::UnknownRegion { region, regions } => {
                let regions = usize::try_from(regions).unwrap_or(usize::MAX);
                Err(TransportError::UnknownRegion { end, region, regions })
            }
            Self::OutOfRange { region, offset, len, region_len } => {
                Err(TransportError::OutOfRange { end, region, offset, len, region_len })
            }
            Self::NotGranted { region, offset, len } => Err(TransportError::NotGranted { region, offset, len }),
        })
    }
}

/// The wire form of a grant that was not given.
pub(super) fn grant_bytes(grant: Option<GrantToken>) -> [u8; 16] {
    // The peer refuses a push without a grant, and it is the one to say so.
    grant.map_or([0; 16], |token| token.0)
}

/// Sends one message.
pub(super) fn send(socket: &Socket, message: &impl Serialize, patience: Patience) -> Result<(), TransportError> {
    let body = postcard::to_stdvec(message).expect("messages are plain data");
    let len = u32::try_from(body.len()).ok().filter(|len| *len <= MESSAGE_BYTES_MAX);
    let len = len.expect("requests are cut to fit");
    socket.write_all(&[&len.to_le_bytes()[..], &body].concat(), patience)
}

/// Receives one message. `idle` is asked while nothing of it has come yet, `patience` afterwards.
pub(super) fn receive<T: DeserializeOwned>(
    socket: &Socket,
    idle: Patience,
    patience: Patience,
) -> Result<T, TransportError> {
    let protocol = |what: String| TransportError::Protocol { peer: socket.peer().to_owned(), what };
    let mut len = [0; 4];
    socket.read_exact(&mut len[..1], idle)?;
    socket.read_exact(&mut len[1..], patience)?;
    let len = u32::from_le_bytes(len);
    if len > MESSAGE_BYTES_MAX {
        return Err(protocol(format!("a message of {len} bytes; at most {MESSAGE_BYTES_MAX} are taken")));
    }
    let mut body = vec![0; usize::try_from(len).unwrap_or(0)];
    socket.read_exact(&mut body, patience)?;
    match postcard::take_from_bytes(&body) {
        Ok((message, [])) => Ok(message),
        Ok((_, rest)) => Err(protocol(format!("a message has {} bytes too many", rest.len()))),
        Err(error) => Err(protocol(format!("a message cannot be read: {error}"))),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_longest_request_fits() {
        let stretches = vec![Stretch { region: u16::MAX, offset: u64::MAX, len: u64::MAX / 2 }; REQUEST_RUNS_MAX];
        let request = Request::Write { sequence: u64::MAX, grant: [255; 16], stretches };
        let bytes = postcard::to_stdvec(&request).unwrap();
        assert!(bytes.len() <= MESSAGE_BYTES_MAX as usize, "{}", bytes.len());
        assert_eq!(postcard::from_bytes::<Request>(&bytes).unwrap(), request);
    }
}
