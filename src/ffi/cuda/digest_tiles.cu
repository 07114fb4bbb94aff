// Adds up the digest of rows of KV where they lie in this GPU's memory: what src/kv/digest.rs says, word for word. A tile is the
// rows of one block, half and layer: `heads` by `tokens`, each `content` bytes long. Every warp takes an eighth of a tile and has
// four loads of each thread under way at once. Built into digest_tiles.ptx by tools/build_ptx.

struct Tile {
    unsigned long long address;
    unsigned long long head_stride;
    unsigned long long token_stride;
    unsigned heads;
    unsigned tokens;
    unsigned plane;
    unsigned token;
    unsigned content;
    unsigned sum;
};

using Word = unsigned long long;

constexpr unsigned LANES = 32;
constexpr unsigned PARTS = 8;
constexpr unsigned ROWS = 4;
constexpr Word GOLDEN = 0x9E3779B97F4A7C15ull;

__device__ Word scatter(unsigned plane, unsigned token) {
    Word x = (static_cast<Word>(plane) << 32 | token) + GOLDEN;
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9ull;
    x = (x ^ (x >> 27)) * 0x94D049BB133111EBull;
    return x ^ (x >> 31);
}

__device__ Word mix(Word word, Word key) {
    const Word x = word ^ key;
    return (x & 0xFFFFFFFFull) * (x >> 32) + (word << 32 | word >> 32);
}

// Word number `at` of a row, filled up with zeros.
__device__ Word load(Word row, unsigned at, unsigned content, bool aligned) {
    if (aligned) return __ldcs(reinterpret_cast<const Word*>(row) + at);
    const auto* bytes = reinterpret_cast<const unsigned char*>(row) + at * 8;
    const unsigned left = content - at * 8;
    Word word = 0;
    for (unsigned byte = 0; byte < 8 && byte < left; ++byte) word |= static_cast<Word>(bytes[byte]) << (8 * byte);
    return word;
}

extern "C" __global__ void __launch_bounds__(256) pdlink_digest_tiles(const Tile* __restrict__ tiles, unsigned count,
                                                                        Word* __restrict__ sums) {
    const unsigned lane = threadIdx.x % LANES;
    const unsigned warps = gridDim.x * (blockDim.x / LANES);
    for (unsigned item = blockIdx.x * (blockDim.x / LANES) + threadIdx.x / LANES; item < count * PARTS; item += warps) {
        const Tile tile = tiles[item / PARTS];
        const unsigned rows = tile.heads * tile.tokens;
        const unsigned words = (tile.content + 7) / 8;
        const bool aligned = ((tile.address | tile.head_stride | tile.token_stride | tile.content) & 7) == 0;
        Word sum = 0;
        for (unsigned first = item % PARTS; first < rows; first += PARTS * ROWS) {
            Word starts[ROWS];
            Word keys[ROWS];
#pragma unroll
            for (unsigned step = 0; step < ROWS; ++step) {
                const unsigned row = first + step * PARTS;
                const unsigned head = row % tile.heads;
                const unsigned token = row / tile.heads;
                starts[step] = tile.address + head * tile.head_stride + token * tile.token_stride;
                keys[step] = scatter(tile.plane + head, tile.token + token);
            }
            for (unsigned word = lane; word < words; word += LANES) {
                Word held[ROWS];
#pragma unroll
                for (unsigned step = 0; step < ROWS; ++step) {
                    if (first + step * PARTS < rows) held[step] = load(starts[step], word, tile.content, aligned);
                }
#pragma unroll
                for (unsigned step = 0; step < ROWS; ++step) {
                    if (first + step * PARTS < rows) sum += mix(held[step], keys[step] + word * GOLDEN);
                }
            }
        }
        for (unsigned distance = LANES / 2; distance > 0; distance /= 2) sum += __shfl_down_sync(~0u, sum, distance);
        if (lane == 0 && sum != 0) atomicAdd(&sums[tile.sum], sum);
    }
}
