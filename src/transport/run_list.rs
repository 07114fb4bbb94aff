//! What one transfer copies: (source, destination, length) runs, grouped by the pair of regions they lie in.

/// One contiguous copy. Offsets count from the start of the segment's regions.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Run {
    pub src: u64,
    pub dst: u64,
    pub len: u64,
}

/// All runs between one source region and one destination region. One segment is one post.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Segment {
    pub src_region: u16,
    pub dst_region: u16,
    pub runs: Vec<Run>,
}

/// The whole copy.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct RunList {
    pub segments: Vec<Segment>,
}

impl RunList {
    /// Bytes that all runs move together.
    pub fn bytes(&self) -> u64 {
        self.segments.iter().flat_map(|segment| &segment.runs).map(|run| run.len).sum()
    }

    /// Number of runs.
    pub fn runs(&self) -> usize {
        self.segments.iter().map(|segment| segment.runs.len()).sum()
    }
}
