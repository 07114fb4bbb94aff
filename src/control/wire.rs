//! Frames: a length, a kind, for requests and answers a number, and a body.
//!
//! ```text
//! u32 length of what follows │ u8 kind │ u32 number (request, answer) │ body
//! ```
//!
//! All numbers are little-endian. The length is checked before anything is allocated for it, and memory grows only as
//! bytes arrive: a peer that announces much and sends little costs little.

use bytes::{Buf, BufMut, Bytes, BytesMut};
use serde::Serialize;
use serde::de::DeserializeOwned;

/// Longest frame, in bytes after the length: a grant of half a million blocks fits.
pub const FRAME_BYTES_MAX: usize = 4 << 20;
const LENGTH_BYTES: usize = 4;

const PING: u8 = 0;
const PONG: u8 = 1;
const HELLO: u8 = 2;
const NOTICE: u8 = 3;
const REQUEST: u8 = 4;
const ANSWER: u8 = 5;

/// One frame. Bodies are postcard, but frames do not look into them.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Frame {
    Ping,
    Pong,
    Hello(Bytes),
    /// Wants no answer.
    Notice(Bytes),
    Request {
        number: u32,
        body: Bytes,
    },
    Answer {
        number: u32,
        body: Bytes,
    },
}

/// Bytes that are no frame, or a body that is no message.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum WireError {
    #[error("a frame of {bytes} bytes, at most {FRAME_BYTES_MAX} are allowed")]
    Oversize { bytes: u64 },
    #[error("{0}")]
    Malformed(String),
}

impl Frame {
    /// The frame as bytes. An outgoing frame that is too long is refused here, not by the peer.
    pub fn encode(&self) -> Result<Bytes, WireError> {
        let (kind, number, body) = match self {
            Self::Ping => (PING, None, &Bytes::new()),
            Self::Pong => (PONG, None, &Bytes::new()),
            Self::Hello(body) => (HELLO, None, body),
            Self::Notice(body) => (NOTICE, None, body),
            Self::Request { number, body } => (REQUEST, Some(*number), body),
            Self::Answer { number, body } => (ANSWER, Some(*number), body),
        };
        let length = 1 + number.map_or(0, |_| 4) + body.len();
        let oversize = WireError::Oversize { bytes: length as u64 };
        if length > FRAME_BYTES_MAX {
            return Err(oversize);
        }
        let mut bytes = BytesMut::with_capacity(LENGTH_BYTES + length);
        bytes.put_u32_le(u32::try_from(length).map_err(|_| oversize)?);
        bytes.put_u8(kind);
        if let Some(number) = number {
            bytes.put_u32_le(number);
        }
        bytes.put_slice(body);
        Ok(bytes.freeze())
    }

    fn decode(mut bytes: Bytes) -> Result<Self, WireError> {
        let malformed = |text: String| WireError::Malformed(text);
        let kind = bytes.try_get_u8().map_err(|_| malformed("an empty frame".to_owned()))?;
        let number = |bytes: &mut Bytes| {
            bytes.try_get_u32_le().map_err(|_| malformed("a request or answer without its number".to_owned()))
        };
        match kind {
            PING | PONG if !bytes.is_empty() => Err(malformed(format!("a ping with {} bytes of body", bytes.len()))),
            PING => Ok(Self::Ping),
            PONG => Ok(Self::Pong),
            HELLO => Ok(Self::Hello(bytes)),
            NOTICE => Ok(Self::Notice(bytes)),
            REQUEST => Ok(Self::Request { number: number(&mut bytes)?, body: bytes }),
            ANSWER => Ok(Self::Answer { number: number(&mut bytes)?, body: bytes }),
            kind => Err(malformed(format!("an unknown kind of frame, {kind}"))),
        }
    }
}

/// Bytes as they arrive, and the frames in them.
#[derive(Debug, Default)]
pub struct FrameBuffer {
    bytes: BytesMut,
}

impl FrameBuffer {
    /// Where to read into.
    pub fn space(&mut self) -> &mut BytesMut {
        self.bytes.reserve(16 * 1024);
        &mut self.bytes
    }

    /// The next whole frame, if it is there. After an error the connection is of no use.
    pub fn next_frame(&mut self) -> Result<Option<Frame>, WireError> {
        let Some(length) = self.bytes.first_chunk::<LENGTH_BYTES>().map(|bytes| u32::from_le_bytes(*bytes)) else {
            return Ok(None);
        };
        let length = usize::try_from(length).unwrap_or(usize::MAX);
        if length > FRAME_BYTES_MAX {
            return Err(WireError::Oversize { bytes: length as u64 });
        }
        if self.bytes.len() < LENGTH_BYTES + length {
            return Ok(None);
        }
        self.bytes.advance(LENGTH_BYTES);
        Frame::decode(self.bytes.split_to(length).freeze()).map(Some)
    }
}

/// A message as a frame's body.
pub fn to_body<T: Serialize>(message: &T) -> Bytes {
    // Our own messages are plain data without maps of unknown length: encoding them cannot fail.
    Bytes::from(postcard::to_stdvec(message).expect("plain data always encodes"))
}

/// A frame's body as a message. Every byte must belong to it.
pub fn from_body<T: DeserializeOwned>(body: &[u8]) -> Result<T, WireError> {
    let (message, rest) = postcard::take_from_bytes(body).map_err(|error| WireError::Malformed(error.to_string()))?;
    if rest.is_empty() {
        Ok(message)
    } else {
        Err(WireError::Malformed(format!("{} bytes are left over after the message", rest.len())))
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::control::{AdminAnswer, AdminRequest};

    fn frames() -> impl Strategy<Value = Frame> {
        let body = proptest::collection::vec(any::<u8>(), 0..200).prop_map(Bytes::from);
        (0..6u8, any::<u32>(), body).prop_map(|(kind, number, body)| match kind {
            0 => Frame::Ping,
            1 => Frame::Pong,
            2 => Frame::Hello(body),
            3 => Frame::Notice(body),
            4 => Frame::Request { number, body },
            _ => Frame::Answer { number, body },
        })
    }

    proptest! {
        #[test]
        fn frames_come_out_as_they_went_in_however_the_bytes_are_cut(
            sent in proptest::collection::vec(frames(), 1..8), cut in 1..50usize
        ) {
            let bytes: Vec<u8> = sent.iter().flat_map(|frame| frame.encode().unwrap()).collect();
            let mut buffer = FrameBuffer::default();
            let mut received = Vec::new();
            for piece in bytes.chunks(cut) {
                buffer.space().extend_from_slice(piece);
                while let Some(frame) = buffer.next_frame().unwrap() {
                    received.push(frame);
                }
            }
            prop_assert_eq!(received, sent);
        }

        #[test]
        fn random_bytes_never_panic_and_never_allocate_what_they_announce(
            bytes in proptest::collection::vec(any::<u8>(), 0..300)
        ) {
            let mut buffer = FrameBuffer::default();
            buffer.space().extend_from_slice(&bytes);
            for _ in 0..bytes.len() + 1 {
                match buffer.next_frame() {
                    Ok(Some(Frame::Request { body, .. } | Frame::Notice(body) | Frame::Hello(body))) => {
                        let _ = from_body::<AdminRequest>(&body);
                        let _ = from_body::<AdminAnswer>(&body);
                    }
                    Ok(Some(_)) => {}
                    Ok(None) | Err(_) => break,
                }
            }
            prop_assert!(buffer.bytes.capacity() <= 64 * 1024);
        }
    }

    #[test]
    fn a_length_beyond_the_bound_is_refused_before_its_bytes_come() {
        let mut buffer = FrameBuffer::default();
        buffer.space().put_u32_le(u32::try_from(FRAME_BYTES_MAX).unwrap() + 1);
        assert_eq!(buffer.next_frame(), Err(WireError::Oversize { bytes: FRAME_BYTES_MAX as u64 + 1 }));
        let body = Bytes::from(vec![0; FRAME_BYTES_MAX]);
        assert!(matches!(Frame::Notice(body).encode(), Err(WireError::Oversize { .. })));
    }

    #[test]
    fn bytes_left_over_after_a_message_are_an_error() {
        let mut body = to_body(&AdminRequest::Status).to_vec();
        assert_eq!(from_body::<AdminRequest>(&body), Ok(AdminRequest::Status));
        body.push(0);
        assert!(from_body::<AdminRequest>(&body).is_err());
    }
}
