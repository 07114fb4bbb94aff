// Copies pieces of memory that this GPU can address, its own or a peer's mapped one. Every warp takes chunks of 4 KiB, whichever
// piece they belong to, and has eight loads of each thread under way at once: a peer's memory is far away, and what fills the
// link is the number of bytes asked for and not yet there. A piece is one row, or many of one length at equal distances. Built into
// copy_runs.ptx by tools/build_ptx; the driver compiles that for the GPU at hand.

struct Piece {
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

// Where byte `at` of a piece lies, counted from its start.
__device__ __forceinline__ unsigned long long place(unsigned at, unsigned len, unsigned step) {
    const unsigned row = at / len;
    return static_cast<unsigned long long>(row) * step + (at - row * len);
}

// `chunks` is the number of chunks of the longest piece.
extern "C" __global__ void __launch_bounds__(1024) pdlink_copy_runs(const Piece* __restrict__ pieces, unsigned count,
                                                                     unsigned chunks) {
    const unsigned lane = threadIdx.x % LANES;
    const unsigned warps = gridDim.x * (blockDim.x / LANES);
    for (unsigned item = blockIdx.x * (blockDim.x / LANES) + threadIdx.x / LANES; item < count * chunks; item += warps) {
        const Piece piece = pieces[item / chunks];
        const unsigned at = item % chunks * CHUNK_BYTES;
        const unsigned total = piece.len * piece.rows;
        if (at >= total) continue;
        const unsigned left = total - at;
        const auto* src = reinterpret_cast<const unsigned char*>(piece.src);
        auto* dst = reinterpret_cast<unsigned char*>(piece.dst);
        const bool one = piece.rows == 1;
        const unsigned odd = one ? 0 : piece.len | piece.src_step | piece.dst_step;
        const bool aligned = ((piece.src | piece.dst | odd) & 15) == 0;
        if (aligned && left >= CHUNK_BYTES) {
            uint4 held[LOADS];
            if (one) {
                const auto* from = reinterpret_cast<const uint4*>(src + at);
                auto* to = reinterpret_cast<uint4*>(dst + at);
#pragma unroll
                for (unsigned load = 0; load < LOADS; ++load) held[load] = __ldcs(from + load * LANES + lane);
#pragma unroll
                for (unsigned load = 0; load < LOADS; ++load) __stcs(to + load * LANES + lane, held[load]);
                continue;
            }
            const unsigned mine = at + lane * 16;
#pragma unroll
            for (unsigned load = 0; load < LOADS; ++load) {
                const auto from = place(mine + load * LANES * 16, piece.len, piece.src_step);
                held[load] = __ldcs(reinterpret_cast<const uint4*>(src + from));
            }
#pragma unroll
            for (unsigned load = 0; load < LOADS; ++load) {
                const auto to = place(mine + load * LANES * 16, piece.len, piece.dst_step);
                __stcs(reinterpret_cast<uint4*>(dst + to), held[load]);
            }
            continue;
        }
        const unsigned end = at + (left < CHUNK_BYTES ? left : CHUNK_BYTES);
        const unsigned words_end = aligned ? end / 16 * 16 : at;
        for (unsigned byte = at + lane * 16; byte < words_end; byte += LANES * 16) {
            const auto from = place(byte, piece.len, piece.src_step), to = place(byte, piece.len, piece.dst_step);
            *reinterpret_cast<uint4*>(dst + to) = *reinterpret_cast<const uint4*>(src + from);
        }
        for (unsigned byte = words_end + lane; byte < end; byte += LANES) {
            dst[place(byte, piece.len, piece.dst_step)] = src[place(byte, piece.len, piece.src_step)];
        }
    }
}
