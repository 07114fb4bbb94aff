//! What goes over a data connection: a fixed header, the runs, the bytes. Little-endian; every length is checked against a
//! bound before anything is allocated or read for it.
#![forbid(unsafe_code)]

use crate::transport::{End, GrantToken, TransportError};

/// Most bytes and runs of one request. A list of runs fits into the smallest socket buffer with room for a second one, so a
/// pipelined request never waits for the answer before it.
pub(super) const REQUEST_BYTES_MAX: u64 = 1024 * 1024;
pub(super) const REQUEST_RUNS_MAX: usize = 512;

pub(super) const REQUEST_HEADER_BYTES: usize = 32;
pub(super) const RUN_BYTES: usize = 16;
pub(super) const ANSWER_BYTES: usize = 32;

/// What is asked of the side that owns the memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Operation {
    /// The bytes of the runs come behind the answer.
    Read,
    /// The bytes of the runs come behind the request.
    Write(GrantToken),
}

/// The head of a request: which region, and how much of what follows.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Request {
    pub(super) operation: Operation,
    pub(super) region: u16,
    pub(super) runs: u32,
    pub(super) bytes: u64,
}

impl Request {
    pub(super) fn encode(&self) -> [u8; REQUEST_HEADER_BYTES] {
        let (code, grant) = match self.operation {
            Operation::Read => (1, [0; 16]),
            Operation::Write(GrantToken(grant)) => (2, grant),
        };
        let mut header = [0; REQUEST_HEADER_BYTES];
        header[0] = code;
        header[2..4].copy_from_slice(&self.region.to_le_bytes());
        header[4..8].copy_from_slice(&self.runs.to_le_bytes());
        header[8..16].copy_from_slice(&self.bytes.to_le_bytes());
        header[16..].copy_from_slice(&grant);
        header
    }

    /// What is wrong with the header, if it is not a request that may be sent.
    pub(super) fn decode(header: &[u8; REQUEST_HEADER_BYTES]) -> Result<Self, String> {
        let operation = match (header[0], header[1]) {
            (1, 0) => Operation::Read,
            (2, 0) => Operation::Write(GrantToken(fixed(&header[16..]))),
            (code, flags) => return Err(format!("request code {code}, flags {flags}")),
        };
        let runs = u32::from_le_bytes(fixed(&header[4..8]));
        let bytes = u64::from_le_bytes(fixed(&header[8..16]));
        if usize::try_from(runs).map_or(true, |runs| runs > REQUEST_RUNS_MAX) || bytes > REQUEST_BYTES_MAX {
            return Err(format!(
                "a request of {runs} runs and {bytes} bytes; at most {REQUEST_RUNS_MAX} and {REQUEST_BYTES_MAX} are taken"
            ));
        }
        Ok(Self { operation, region: u16::from_le_bytes(fixed(&header[2..4])), runs, bytes })
    }
}

pub(super) fn encode_run(offset: u64, len: u64) -> [u8; RUN_BYTES] {
    let mut run = [0; RUN_BYTES];
    run[..8].copy_from_slice(&offset.to_le_bytes());
    run[8..].copy_from_slice(&len.to_le_bytes());
    run
}

pub(super) fn decode_run(run: &[u8; RUN_BYTES]) -> (u64, u64) {
    (u64::from_le_bytes(fixed(&run[..8])), u64::from_le_bytes(fixed(&run[8..])))
}

/// What the side that owns the memory says to a request.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Answer {
    Done,
    UnknownRegion { region: u16, regions: u32 },
    OutOfRange { region: u16, offset: u64, len: u64, region_len: u64 },
    NotGranted { region: u16, offset: u64, len: u64 },
}

impl Answer {
    pub(super) fn encode(self) -> [u8; ANSWER_BYTES] {
        let (code, region, regions, [offset, len, region_len]) = match self {
            Self::Done => (0, 0, 0, [0; 3]),
            Self::UnknownRegion { region, regions } => (1, region, regions, [0; 3]),
            Self::OutOfRange { region, offset, len, region_len } => (2, region, 0, [offset, len, region_len]),
            Self::NotGranted { region, offset, len } => (3, region, 0, [offset, len, 0]),
        };
        let mut answer = [0; ANSWER_BYTES];
        answer[0] = code;
        answer[2..4].copy_from_slice(&u16::to_le_bytes(region));
        answer[4..8].copy_from_slice(&u32::to_le_bytes(regions));
        answer[8..16].copy_from_slice(&u64::to_le_bytes(offset));
        answer[16..24].copy_from_slice(&u64::to_le_bytes(len));
        answer[24..].copy_from_slice(&u64::to_le_bytes(region_len));
        answer
    }

    pub(super) fn decode(answer: &[u8; ANSWER_BYTES]) -> Result<Self, String> {
        let region = u16::from_le_bytes(fixed(&answer[2..4]));
        let regions = u32::from_le_bytes(fixed(&answer[4..8]));
        let offset = u64::from_le_bytes(fixed(&answer[8..16]));
        let len = u64::from_le_bytes(fixed(&answer[16..24]));
        let region_len = u64::from_le_bytes(fixed(&answer[24..]));
        match answer[0] {
            0 => Ok(Self::Done),
            1 => Ok(Self::UnknownRegion { region, regions }),
            2 => Ok(Self::OutOfRange { region, offset, len, region_len }),
            3 => Ok(Self::NotGranted { region, offset, len }),
            code => Err(format!("answer code {code}")),
        }
    }

    /// The answer as the transfer's result, whose remote end is `end`.
    pub(super) fn result(self, end: End) -> Result<(), TransportError> {
        match self {
            Self::Done => Ok(()),
            Self::UnknownRegion { region, regions } => Err(TransportError::UnknownRegion {
                end,
                region,
                regions: usize::try_from(regions).unwrap_or(usize::MAX),
            }),
            Self::OutOfRange { region, offset, len, region_len } => {
                Err(TransportError::OutOfRange { end, region, offset, len, region_len })
            }
            Self::NotGranted { region, offset, len } => Err(TransportError::NotGranted { region, offset, len }),
        }
    }
}

/// A fixed-size field. The callers slice by constants, so the lengths agree.
fn fixed<const N: usize>(bytes: &[u8]) -> [u8; N] {
    bytes.try_into().expect("a field is as long as its type")
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn frames_come_back_as_they_were() {
        for operation in [Operation::Read, Operation::Write(GrantToken([7; 16]))] {
            let request = Request { operation, region: 513, runs: 512, bytes: 1_000_001 };
            assert_eq!(Request::decode(&request.encode()), Ok(request));
        }
        let answers = [
            Answer::Done,
            Answer::UnknownRegion { region: 300, regions: 2 },
            Answer::OutOfRange { region: 300, offset: u64::MAX, len: 2, region_len: 3 },
            Answer::NotGranted { region: 300, offset: 1, len: 2 },
        ];
        for answer in answers {
            assert_eq!(Answer::decode(&answer.encode()), Ok(answer));
        }
        assert_eq!(decode_run(&encode_run(1, u64::MAX)), (1, u64::MAX));
    }

    proptest! {
        #[test]
        fn whatever_is_decoded_is_within_bounds(header in prop::array::uniform32(any::<u8>()), code in 0_u8..4) {
            let mut header = header;
            (header[0], header[1]) = (code, 0);
            if let Ok(request) = Request::decode(&header) {
                prop_assert!(request.bytes <= REQUEST_BYTES_MAX && request.runs <= 512);
            }
            let _ = Answer::decode(&header);
        }
    }
}
