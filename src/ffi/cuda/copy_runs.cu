// Copies pieces of memory that this GPU can address, its own or a peer's mapped one. Every warp takes chunks of 4 KiB, whichever
// piece they belong to, and has eight loads of each thread under way at once: a peer's memory is far away, and what fills the
// link is the number of bytes asked for and not yet there. Built into copy_runs.ptx by tools/build_ptx; the driver
// compiles that for the GPU at hand.

struct Piece {
    unsigned long long src;
    unsigned long long dst;
    unsigned long long len;
};

constexpr unsigned LANES = 32;
constexpr unsigned LOADS = 8;
constexpr unsigned CHUNK_WORDS = LANES * LOADS;
constexpr unsigned CHUNK_BYTES = CHUNK_WORDS * 16;

// `chunks` is the number of chunks of the longest piece.
extern "C" __global__ void __launch_bounds__(1024) pdlink_copy_runs(const Piece* __restrict__ pieces, unsigned count,
                                                                     unsigned chunks) {
    const unsigned lane = threadIdx.x % LANES;
    const unsigned warps = gridDim.x * (blockDim.x / LANES);
    for (unsigned item = blockIdx.x * (blockDim.x / LANES) + threadIdx.x / LANES; item < count * chunks; item += warps) {
        const Piece piece = pieces[item / chunks];
        const unsigned long long at = static_cast<unsigned long long>(item % chunks) * CHUNK_BYTES;
        if (at >= piece.len) continue;
        const unsigned long long left = piece.len - at;
        const auto* src = reinterpret_cast<const unsigned char*>(piece.src + at);
        auto* dst = reinterpret_cast<unsigned char*>(piece.dst + at);
        const bool aligned = ((piece.src | piece.dst) & 15) == 0;
        const auto* from = reinterpret_cast<const uint4*>(src);
        auto* to = reinterpret_cast<uint4*>(dst);
        if (aligned && left >= CHUNK_BYTES) {
            uint4 held[LOADS];
#pragma unroll
            for (unsigned load = 0; load < LOADS; ++load) held[load] = __ldcs(from + load * LANES + lane);
#pragma unroll
            for (unsigned load = 0; load < LOADS; ++load) __stcs(to + load * LANES + lane, held[load]);
            continue;
        }
        const unsigned bytes = left < CHUNK_BYTES ? static_cast<unsigned>(left) : CHUNK_BYTES;
        const unsigned words = aligned ? bytes / 16 : 0;
        for (unsigned word = lane; word < words; word += LANES) to[word] = from[word];
        for (unsigned byte = words * 16 + lane; byte < bytes; byte += LANES) dst[byte] = src[byte];
    }
}
