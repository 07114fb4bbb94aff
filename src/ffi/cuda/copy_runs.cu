// Copies pieces of memory that this GPU can address, its own or a peer's mapped one. Every warp takes chunks of 4 KiB, whichever
// piece they belong to, and has eight loads of each thread under way at once: a peer's memory is far away, and what fills the
// link is the number of bytes asked for and not yet there. A piece is one run, or rows: runs of one length at equal distances. Built
// into copy_runs.ptx by tools/build_ptx; the driver compiles that for the GPU at hand.

// Addresses in the lower 48 bits, and above them the length: its lower 16 bits beside the source, the rest beside the destination.
// Lists are as long as runs are many, and go over the bus.
struct __align__(16) Run {
    unsigned long long src;
    unsigned long long dst;
};

// Runs that come with the launch: reading a list in host memory takes the GPU a microsecond before it can begin.
struct Few {
    Run runs[8];
    unsigned count;
    unsigned chunks;
};

struct __align__(16) Rows {
    unsigned long long src;
    unsigned long long dst;
    unsigned len;
    unsigned rows;
    unsigned src_step;
    unsigned dst_step;
};

constexpr unsigned LANES = 32;
constexpr unsigned LOADS = 8;
constexpr unsigned CHUNK_WORDS = LANES * LOADS;
constexpr unsigned CHUNK_BYTES = CHUNK_WORDS * 16;
constexpr unsigned ADDRESS_BITS = 48;
constexpr unsigned long long ADDRESS = (1ull << ADDRESS_BITS) - 1;

__device__ __forceinline__ unsigned chunk_end(unsigned at, unsigned total) {
    return total - at < CHUNK_BYTES ? total : at + CHUNK_BYTES;
}

// Copies the chunk that begins with byte `at` of the run.
__device__ __forceinline__ void copy_chunk(const Run& run, unsigned at, unsigned lane) {
    const auto* src = reinterpret_cast<const unsigned char*>(run.src & ADDRESS);
    auto* dst = reinterpret_cast<unsigned char*>(run.dst & ADDRESS);
    const unsigned len = static_cast<unsigned>(run.src >> ADDRESS_BITS | run.dst >> ADDRESS_BITS << 16);
    if (at >= len) return;
    const bool aligned = ((run.src | run.dst) & 15) == 0;
    if (aligned && len - at >= CHUNK_BYTES) {
        const auto* from = reinterpret_cast<const uint4*>(src + at);
        auto* to = reinterpret_cast<uint4*>(dst + at);
        uint4 held[LOADS];
#pragma unroll
        for (unsigned load = 0; load < LOADS; ++load) held[load] = __ldcs(from + load * LANES + lane);
#pragma unroll
        for (unsigned load = 0; load < LOADS; ++load) __stcs(to + load * LANES + lane, held[load]);
        return;
    }
    const unsigned end = chunk_end(at, len);
    const unsigned words_end = aligned ? end / 16 * 16 : at;
    for (unsigned byte = at + lane * 16; byte < words_end; byte += LANES * 16) {
        *reinterpret_cast<uint4*>(dst + byte) = *reinterpret_cast<const uint4*>(src + byte);
    }
    for (unsigned byte = words_end + lane; byte < end; byte += LANES) dst[byte] = src[byte];
}

// Where byte `at` of rows lies, counted from their start.
__device__ __forceinline__ unsigned long long place(unsigned at, unsigned len, unsigned step) {
    const unsigned row = at / len;
    return static_cast<unsigned long long>(row) * step + (at - row * len);
}

__device__ __forceinline__ void copy_chunk(const Rows& rows, unsigned at, unsigned lane) {
    const unsigned total = rows.len * rows.rows;
    if (at >= total) return;
    const auto* src = reinterpret_cast<const unsigned char*>(rows.src);
    auto* dst = reinterpret_cast<unsigned char*>(rows.dst);
    const bool aligned = ((rows.src | rows.dst | rows.len | rows.src_step | rows.dst_step) & 15) == 0;
    if (aligned && total - at >= CHUNK_BYTES) {
        const unsigned mine = at + lane * 16;
        uint4 held[LOADS];
#pragma unroll
        for (unsigned load = 0; load < LOADS; ++load) {
            const auto from = place(mine + load * LANES * 16, rows.len, rows.src_step);
            held[load] = __ldcs(reinterpret_cast<const uint4*>(src + from));
        }
#pragma unroll
        for (unsigned load = 0; load < LOADS; ++load) {
            const auto to = place(mine + load * LANES * 16, rows.len, rows.dst_step);
            __stcs(reinterpret_cast<uint4*>(dst + to), held[load]);
        }
        return;
    }
    const unsigned end = chunk_end(at, total);
    const unsigned words_end = aligned ? end / 16 * 16 : at;
    for (unsigned byte = at + lane * 16; byte < words_end; byte += LANES * 16) {
        const auto from = place(byte, rows.len, rows.src_step), to = place(byte, rows.len, rows.dst_step);
        *reinterpret_cast<uint4*>(dst + to) = *reinterpret_cast<const uint4*>(src + from);
    }
    for (unsigned byte = words_end + lane; byte < end; byte += LANES) {
        dst[place(byte, rows.len, rows.dst_step)] = src[place(byte, rows.len, rows.src_step)];
    }
}

// `chunks` is the number of chunks of the longest piece.
template <class Piece>
__device__ __forceinline__ void copy_all(const Piece* __restrict__ pieces, unsigned count, unsigned chunks) {
    const unsigned lane = threadIdx.x % LANES;
    const unsigned warps = gridDim.x * (blockDim.x / LANES);
    for (unsigned item = blockIdx.x * (blockDim.x / LANES) + threadIdx.x / LANES; item < count * chunks; item += warps) {
        copy_chunk(pieces[item / chunks], item % chunks * CHUNK_BYTES, lane);
    }
}

extern "C" __global__ void __launch_bounds__(1024) pdlink_copy_runs(const Run* __restrict__ runs, unsigned count,
                                                                     unsigned chunks) {
    copy_all(runs, count, chunks);
}

extern "C" __global__ void __launch_bounds__(1024) pdlink_copy_rows(const Rows* __restrict__ rows, unsigned count,
                                                                     unsigned chunks) {
    copy_all(rows, count, chunks);
}

// For one block with a warp for each chunk. It says itself that it is done, which takes the stream longer: `value` in `word`, in host
// memory, once everything that the block has written is there for whoever sees it.
extern "C" __global__ void __launch_bounds__(1024) pdlink_copy_few(const Few few, unsigned* word, unsigned value) {
    const unsigned item = threadIdx.x / LANES;
    if (item < few.count * few.chunks) {
        copy_chunk(few.runs[item / few.chunks], item % few.chunks * CHUNK_BYTES, threadIdx.x % LANES);
    }
    __syncthreads();
    if (threadIdx.x == 0) {
        // Of the other threads' writes too: the barrier has put those before it.
        __threadfence_system();
        *static_cast<volatile unsigned*>(word) = value;
    }
}
