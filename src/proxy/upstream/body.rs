//! The body of a worker's answer: bytes out of `Content-Length`, chunked or close framing, as they come.

use std::task::{Context, Poll, ready};

use bytes::{Buf, Bytes, BytesMut};

use super::head::Framing;
use super::{Conn, READ_BYTES, READ_BYTES_MAX, UpstreamError};

/// Longest chunk-size line with its extensions, and longest block of trailers.
const CHUNK_LINE_BYTES_MAX: usize = 4 << 10;

/// What is left to read.
#[derive(Debug)]
enum Left {
    Length(u64),
    /// Before a chunk-size line.
    ChunkSize,
    /// Inside a chunk.
    Chunk(u64),
    /// Behind a chunk, before its line end.
    ChunkEnd,
    /// Behind the last chunk: lines until an empty one.
    Trailers,
    Close,
    Done,
}

/// Reads one body.
#[derive(Debug)]
pub(crate) struct BodyReader {
    left: Left,
    /// Size of the next read: doubles while reads fill up, so that long bodies take few of them.
    room: usize,
}

impl BodyReader {
    pub(super) fn new(framing: Framing) -> Self {
        let left = match framing {
            Framing::Length(0) => Left::Done,
            Framing::Length(bytes) => Left::Length(bytes),
            Framing::Chunked => Left::ChunkSize,
            Framing::Close => Left::Close,
        };
        Self { left, room: READ_BYTES }
    }

    pub(crate) fn is_done(&self) -> bool {
        matches!(self.left, Left::Done)
    }

    /// Whether the body's end is the connection's end, so that a broken one looks like a finished one.
    fn ends_with_connection(&self) -> bool {
        matches!(self.left, Left::Close)
    }

    pub(super) fn poll_data(
        &mut self,
        cx: &mut Context<'_>,
        conn: &mut Conn,
    ) -> Poll<Result<Option<Bytes>, UpstreamError>> {
        loop {
            if let Some(data) = self.decode(&mut conn.buffer)? {
                return Poll::Ready(Ok(Some(data)));
            }
            if self.is_done() {
                return Poll::Ready(Ok(None));
            }
            let room = match self.left {
                Left::Length(bytes) => usize::try_from(bytes).unwrap_or(usize::MAX).clamp(1, READ_BYTES_MAX),
                _ => self.room,
            };
            let read = ready!(conn.poll_fill(cx, room)).map_err(UpstreamError::Receive)?;
            if read >= self.room {
                self.room = (self.room * 2).min(READ_BYTES_MAX);
            }
            if read == 0 {
                if !self.ends_with_connection() {
                    return Poll::Ready(Err(UpstreamError::Truncated));
                }
                self.left = Left::Done;
            }
        }
    }

    /// Takes what can be taken off `buffer`. Chunks that lie in it together are moved together: one part for the
    /// client instead of many.
    fn decode(&mut self, buffer: &mut BytesMut) -> Result<Option<Bytes>, UpstreamError> {
        match self.left {
            Left::Done => Ok(None),
            Left::Length(bytes) => {
                let take = usize::try_from(bytes).unwrap_or(usize::MAX).min(buffer.len());
                let left = bytes - take as u64;
                self.left = if left == 0 { Left::Done } else { Left::Length(left) };
                Ok((take > 0).then(|| buffer.split_to(take).freeze()))
            }
            Left::Close => Ok((!buffer.is_empty()).then(|| buffer.split().freeze())),
            _ => self.decode_chunks(buffer),
        }
    }

    fn decode_chunks(&mut self, buffer: &mut BytesMut) -> Result<Option<Bytes>, UpstreamError> {
        // Data is gathered in `data_start..data_end`; `at` is how far the buffer has been read.
        let (mut data_start, mut data_end, mut at) = (0, 0, 0);
        while at < buffer.len() {
            match self.left {
                Left::ChunkSize => {
                    let Some((size, line)) = chunk_size(&buffer[at..])? else { break };
                    at += line;
                    self.left = if size == 0 { Left::Trailers } else { Left::Chunk(size) };
                }
                Left::Chunk(size) => {
                    let take = usize::try_from(size).unwrap_or(usize::MAX).min(buffer.len() - at);
                    if data_start == data_end {
                        (data_start, data_end) = (at, at + take);
                    } else {
                        buffer.copy_within(at..at + take, data_end);
                        data_end += take;
                    }
                    at += take;
                    let left = size - take as u64;
                    self.left = if left == 0 { Left::ChunkEnd } else { Left::Chunk(left) };
                }
                Left::ChunkEnd => {
                    let Some(line) = line_end(&buffer[at..], 2)? else { break };
                    if line != 2 {
                        return Err(UpstreamError::BadHead("a chunk is longer than its size"));
                    }
                    at += line;
                    self.left = Left::ChunkSize;
                }
                Left::Trailers => {
                    let Some(line) = line_end(&buffer[at..], CHUNK_LINE_BYTES_MAX)? else { break };
                    at += line;
                    if line == 2 {
                        self.left = Left::Done;
                        break;
                    }
                }
                Left::Length(_) | Left::Close | Left::Done => break,
            }
        }
        if data_start == data_end {
            buffer.advance(at);
            return Ok(None);
        }
        buffer.advance(data_start);
        let data = buffer.split_to(data_end - data_start).freeze();
        buffer.advance(at - data_end);
        Ok(Some(data))
    }
}

/// Size of a chunk and length of its line, once the line is whole.
fn chunk_size(buffer: &[u8]) -> Result<Option<(u64, usize)>, UpstreamError> {
    match httparse::parse_chunk_size(buffer) {
        Ok(httparse::Status::Complete((line, size))) => Ok(Some((size, line))),
        Ok(httparse::Status::Partial) if buffer.len() < CHUNK_LINE_BYTES_MAX => Ok(None),
        _ => Err(UpstreamError::BadHead("a chunk has no readable size")),
    }
}

/// Length of the line at the front of `buffer`, line end included, once it is whole.
fn line_end(buffer: &[u8], bytes_max: usize) -> Result<Option<usize>, UpstreamError> {
    match memchr::memchr(b'\n', &buffer[..buffer.len().min(bytes_max)]) {
        Some(at) if at > 0 && buffer[at - 1] == b'\r' => Ok(Some(at + 1)),
        None if buffer.len() < bytes_max => Ok(None),
        _ => Err(UpstreamError::BadHead("a chunk does not end where it should")),
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// Feeds `wire` in pieces and returns the data, the number of parts, and whether it ended properly.
    fn read(wire: &[u8], pieces: &[usize]) -> Result<(Vec<u8>, bool, usize), UpstreamError> {
        let mut reader = BodyReader::new(Framing::Chunked);
        let (mut buffer, mut data, mut at) = (BytesMut::new(), Vec::new(), 0);
        for piece in pieces.iter().copied().chain(std::iter::once(wire.len())) {
            let to = (at + piece).min(wire.len());
            buffer.extend_from_slice(&wire[at..to]);
            at = to;
            while let Some(part) = reader.decode(&mut buffer)? {
                data.extend_from_slice(&part);
            }
        }
        Ok((data, reader.is_done(), buffer.len()))
    }

    #[test]
    fn chunks_in_one_read_become_one_part() {
        let mut reader = BodyReader::new(Framing::Chunked);
        let mut buffer = BytesMut::from("3\r\nabc\r\n4;x=1\r\ndefg\r\n5\r\nhi".as_bytes());
        assert_eq!(reader.decode(&mut buffer).expect("valid").as_deref(), Some(b"abcdefghi".as_slice()));
        buffer.extend_from_slice(b"jkl\r\n0\r\nx-trailer: 1\r\n\r\nleft");
        assert_eq!(reader.decode(&mut buffer).expect("valid").as_deref(), Some(b"jkl".as_slice()));
        assert!(reader.is_done());
        assert_eq!(&buffer[..], b"left");
    }

    #[test]
    fn broken_chunks_are_refused() {
        for wire in ["zz\r\n", "3\r\nabcd\r\n", "3\r\nabcX\n", "ffffffffffffffffff\r\n"] {
            assert!(read(wire.as_bytes(), &[]).is_err(), "case: {wire}");
        }
        let long = format!("3;{}", "x".repeat(5000));
        assert!(read(long.as_bytes(), &[]).is_err());
    }

    proptest! {
        #[test]
        fn chunks_survive_any_cut(
            chunks in prop::collection::vec(prop::collection::vec(any::<u8>(), 1..40), 0..8),
            pieces in prop::collection::vec(1..9usize, 0..80),
        ) {
            let mut wire = Vec::new();
            for chunk in &chunks {
                wire.extend_from_slice(format!("{:x}\r\n", chunk.len()).as_bytes());
                wire.extend_from_slice(chunk);
                wire.extend_from_slice(b"\r\n");
            }
            wire.extend_from_slice(b"0\r\n\r\n");
            let (data, done, left) = read(&wire, &pieces).expect("valid");
            prop_assert_eq!(data, chunks.concat());
            prop_assert!(done);
            prop_assert_eq!(left, 0);
        }
    }
}
