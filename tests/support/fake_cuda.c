/* A stand-in for libcuda.so.1 whose GPU memory is host memory: what pdlink calls of the driver, done at once, and its
 * kernels in C. Memory is a memory file, so that other processes map it as they map a GPU's. Strict where the driver is:
 * memory is touched only with a context current, and only where something was allocated or mapped.
 *
 * What it is like is said in the environment of each process:
 *   FAKE_CUDA_GPUS=2     so many GPUs are visible (1)
 *   FAKE_CUDA_FIRST=1    and the first of them is the machine's second, as CUDA_VISIBLE_DEVICES=1 makes it (0)
 *   FAKE_CUDA_BYTES=n    each has so much memory (4 GiB)
 *   FAKE_CUDA_NO_PEERS=1 no GPU reaches another
 *   FAKE_CUDA_APART=1    memory of a GPU that is not visible cannot be opened: MIG, or another container's
 *   FAKE_CUDA_NO_WRITES=1  streams write no numbers
 *   FAKE_CUDA_LEAST=2    the lowest priority of a stream (0)
 * Compiled with OLD, it lacks what older drivers lack. */
#define _GNU_SOURCE
#include <fcntl.h>
#include <pthread.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

enum {
    SUCCESS, INVALID_VALUE, OUT_OF_MEMORY, NO_DEVICE = 100, INVALID_DEVICE = 101, INVALID_CONTEXT = 201, PEERS_UNSUPPORTED = 217,
    INVALID_HANDLE = 400, NOT_READY = 600, ILLEGAL_ADDRESS = 700, LAUNCH_TIMEOUT = 702, NOT_SUPPORTED = 801,
};
enum { BLOCKS_MAX = 4096, GPUS_MAX = 8, CONTEXTS_MAX = 16, PRIORITIES = 8, WAIT_MAX_MS = 30000 };

typedef uint64_t Ptr;
/* Which file of which process, and on which of the machine's GPUs. */
typedef struct { int pid, fd, gpu; char rest[52]; } Handle;
typedef struct { Ptr at; size_t len; int fd, gpu; } Block;
/* How many things others put on it, and how many of them are done. What this file does is done at once. */
typedef struct { uint64_t issued, done; int priority; } Stream;
typedef struct { Stream *stream; uint64_t issued; } Event;

static Block blocks[BLOCKS_MAX];
static Block fixed[BLOCKS_MAX];
static size_t taken[GPUS_MAX];
static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
/* Streams that were made, by priority from the lowest number on. */
static int made_with[PRIORITIES];
static _Thread_local int depth, contexts[CONTEXTS_MAX];

static long said(const char *name, long otherwise) {
    const char *text = getenv(name);
    return text ? strtol(text, NULL, 10) : otherwise;
}
static size_t memory(void) { return said("FAKE_CUDA_BYTES", (size_t)4 << 30); }
static int gpus(void) { return said("FAKE_CUDA_GPUS", 1); }
static int current(void) { return depth ? contexts[depth - 1] : 0; }
/* Of the machine's numbers, the one of a GPU that is visible here. */
static int of_machine(int gpu) { return said("FAKE_CUDA_FIRST", 0) + gpu; }

static int keep(void *at, size_t len, int fd, Ptr *made) {
    pthread_mutex_lock(&lock);
    int place = 0;
    while (place < BLOCKS_MAX && blocks[place].at) place++;
    if (place < BLOCKS_MAX) blocks[place] = (Block){ (Ptr)(uintptr_t)at, len, fd, current() };
    pthread_mutex_unlock(&lock);
    *made = (Ptr)(uintptr_t)at;
    return place < BLOCKS_MAX ? SUCCESS : OUT_OF_MEMORY;
}
static int let_go(Ptr at, int ours) {
    pthread_mutex_lock(&lock);
    int found = INVALID_VALUE;
    for (int i = 0; i < BLOCKS_MAX && at; i++) {
        if (blocks[i].at != at || (blocks[i].fd >= 0) != ours) continue;
        munmap((void *)(uintptr_t)at, blocks[i].len);
        if (ours) close(blocks[i].fd), taken[blocks[i].gpu] -= blocks[i].len;
        blocks[i].at = 0, found = SUCCESS;
        break;
    }
    pthread_mutex_unlock(&lock);
    return found;
}
static int within(Ptr at, size_t len, Block *found) {
    int is = 0;
    pthread_mutex_lock(&lock);
    for (int i = 0; i < BLOCKS_MAX && !is; i++)
        if (blocks[i].at && at >= blocks[i].at && at + len <= blocks[i].at + blocks[i].len) {
            is = 1;
            if (found) *found = blocks[i];
        }
    pthread_mutex_unlock(&lock);
    return is;
}
static int is_fixed(Ptr at, size_t len) {
    int is = 0;
    pthread_mutex_lock(&lock);
    for (int i = 0; i < BLOCKS_MAX && !is; i++) is = fixed[i].at && at >= fixed[i].at && at + len <= fixed[i].at + fixed[i].len;
    pthread_mutex_unlock(&lock);
    return is;
}
static int usable(Ptr at, size_t len) {
    if (!depth) return INVALID_CONTEXT;
    return within(at, len, NULL) ? SUCCESS : ILLEGAL_ADDRESS;
}

int cuInit(unsigned flags) { return flags ? INVALID_VALUE : gpus() > 0 ? SUCCESS : NO_DEVICE; }
int cuDriverGetVersion(int *version) { return *version = 13000, SUCCESS; }
int cuDeviceGetCount(int *count) { return *count = gpus(), SUCCESS; }
int cuDeviceGetName(char *name, int len, int device) { return snprintf(name, len, "Stand-in %d", device), SUCCESS; }
int cuDeviceTotalMem_v2(size_t *bytes, int device) { return *bytes = memory(), device < gpus() ? SUCCESS : INVALID_DEVICE; }
int cuDeviceGetP2PAttribute(int *value, int attribute, int one, int other) {
    return *value = !said("FAKE_CUDA_NO_PEERS", 0), one != other ? SUCCESS : INVALID_DEVICE;
}
int cuDeviceGet(int *device, int ordinal) {
    return *device = ordinal, ordinal >= 0 && ordinal < gpus() ? SUCCESS : INVALID_DEVICE;
}
int cuDeviceGetAttribute(int *value, int attribute, int device) { return *value = 4, SUCCESS; }
int cuDeviceGetUuid_v2(char uuid[16], int device) { return memset(uuid, 'a' + of_machine(device), 16), SUCCESS; }
int cuDevicePrimaryCtxRetain(void **context, int device) { return *context = (void *)(uintptr_t)(device + 1), SUCCESS; }
int cuDevicePrimaryCtxRelease_v2(int device) { return SUCCESS; }
int cuCtxPushCurrent_v2(void *context) {
    if (!context || depth == CONTEXTS_MAX) return INVALID_CONTEXT;
    return contexts[depth++] = (int)(uintptr_t)context - 1, SUCCESS;
}
int cuCtxPopCurrent_v2(void **context) { return *context = NULL, depth > 0 ? depth--, SUCCESS : INVALID_CONTEXT; }

int cuMemAlloc_v2(Ptr *made, size_t len) {
    if (!depth) return INVALID_CONTEXT;
    if (!len) return INVALID_VALUE;
    pthread_mutex_lock(&lock);
    int fits = taken[current()] + len <= memory();
    if (fits) taken[current()] += len;
    pthread_mutex_unlock(&lock);
    if (!fits) return OUT_OF_MEMORY;
    int fd = memfd_create("fake-cuda", MFD_CLOEXEC);
    if (fd < 0 || ftruncate(fd, len)) return OUT_OF_MEMORY;
    void *at = mmap(NULL, len, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
    if (at == MAP_FAILED) return OUT_OF_MEMORY;
    memset(at, 0xA5, len);
    return keep(at, len, fd, made);
}
int cuMemFree_v2(Ptr at) { return depth ? let_go(at, 1) : INVALID_CONTEXT; }
int cuMemGetInfo_v2(size_t *free_bytes, size_t *total) {
    return *total = memory(), *free_bytes = memory() - taken[current()], depth ? SUCCESS : INVALID_CONTEXT;
}
int cuMemGetAddressRange_v2(Ptr *base, size_t *len, Ptr at) {
    Block block;
    if (!within(at, 1, &block)) return INVALID_VALUE;
    return *base = block.at, *len = block.len, SUCCESS;
}
int cuMemsetD8_v2(Ptr at, unsigned char byte, size_t len) {
    int status = usable(at, len);
    if (!status) memset((void *)(uintptr_t)at, byte, len);
    return status;
}
int cuMemcpyHtoD_v2(Ptr to, const void *from, size_t len) {
    int status = usable(to, len);
    if (!status) memcpy((void *)(uintptr_t)to, from, len);
    return status;
}
int cuMemcpyHtoDAsync_v2(Ptr to, const void *from, size_t len, void *stream) { return cuMemcpyHtoD_v2(to, from, len); }
int cuMemcpyDtoH_v2(void *to, Ptr from, size_t len) {
    int status = usable(from, len);
    if (!status) memcpy(to, (const void *)(uintptr_t)from, len);
    return status;
}
int cuMemcpyDtoHAsync_v2(void *to, Ptr from, size_t len, void *stream) { return cuMemcpyDtoH_v2(to, from, len); }
int cuMemcpyDtoD_v2(Ptr to, Ptr from, size_t len) {
    int status = usable(to, len);
    if (!status) status = usable(from, len);
    if (!status) memcpy((void *)(uintptr_t)to, (const void *)(uintptr_t)from, len);
    return status;
}
int cuMemHostAlloc(void **made, size_t len, unsigned flags) { return *made = calloc(1, len), depth ? SUCCESS : INVALID_CONTEXT; }
int cuMemFreeHost(void *at) { return free(at), SUCCESS; }
/* Host memory that kernels may read: what is registered as mapped (2). */
int cuMemHostRegister_v2(void *at, size_t len, unsigned flags) {
    if (!depth || !at || !len) return INVALID_VALUE;
    pthread_mutex_lock(&lock);
    int place = 0;
    while (place < BLOCKS_MAX && fixed[place].at) place++;
    if (place < BLOCKS_MAX) fixed[place] = (Block){ (Ptr)(uintptr_t)at, flags & 2 ? len : 0, -1, current() };
    pthread_mutex_unlock(&lock);
    return place < BLOCKS_MAX ? SUCCESS : OUT_OF_MEMORY;
}
int cuMemHostUnregister(void *at) {
    int status = INVALID_VALUE;
    pthread_mutex_lock(&lock);
    for (int i = 0; i < BLOCKS_MAX && at; i++)
        if (fixed[i].at == (Ptr)(uintptr_t)at) fixed[i].at = 0, status = SUCCESS;
    pthread_mutex_unlock(&lock);
    return status;
}
int cuMemHostGetDevicePointer_v2(Ptr *seen, void *at, unsigned flags) {
    *seen = (Ptr)(uintptr_t)at;
    return !flags && is_fixed(*seen, 1) ? SUCCESS : INVALID_VALUE;
}

int cuIpcGetMemHandle(Handle *handle, Ptr at) {
    Block block;
    if (!within(at, 1, &block) || block.at != at || block.fd < 0) return INVALID_VALUE;
    *handle = (Handle){ getpid(), block.fd, of_machine(block.gpu) };
    return SUCCESS;
}
int cuIpcOpenMemHandle_v2(Ptr *made, Handle handle, unsigned flags) {
    struct stat stat;
    char path[64];
    int first = of_machine(0), visible = handle.gpu >= first && handle.gpu < first + gpus();
    if (!visible && said("FAKE_CUDA_APART", 0)) return INVALID_DEVICE;
    if (handle.gpu != of_machine(current()) && said("FAKE_CUDA_NO_PEERS", 0)) return PEERS_UNSUPPORTED;
    /* The driver lets no process open what is its own. */
    if (handle.pid == getpid()) return INVALID_VALUE;
    snprintf(path, sizeof path, "/proc/%d/fd/%d", handle.pid, handle.fd);
    int fd = open(path, O_RDWR | O_CLOEXEC);
    if (fd < 0) return INVALID_HANDLE;
    void *at = fstat(fd, &stat) ? MAP_FAILED : mmap(NULL, stat.st_size, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
    close(fd);
    return at == MAP_FAILED ? INVALID_HANDLE : keep(at, stat.st_size, -1, made);
}
int cuIpcCloseMemHandle(Ptr at) { return let_go(at, 0); }

/* For a stand-in of NCCL, which takes its time: what it puts on a stream, and when each of those is done. */
void fake_cuda_issue(Stream *stream) { __atomic_add_fetch(&stream->issued, 1, __ATOMIC_SEQ_CST); }
void fake_cuda_done(Stream *stream) { __atomic_add_fetch(&stream->done, 1, __ATOMIC_SEQ_CST); }
static uint64_t issued(Stream *stream) { return stream ? __atomic_load_n(&stream->issued, __ATOMIC_SEQ_CST) : 0; }
static int is_done(Stream *stream, uint64_t count) { return !stream || __atomic_load_n(&stream->done, __ATOMIC_SEQ_CST) >= count; }
static int wait_for(Stream *stream, uint64_t count) {
    for (int waited = 0; !is_done(stream, count); waited++) {
        /* The driver would wait for ever; a test is to fail. */
        if (waited == WAIT_MAX_MS * 10) return LAUNCH_TIMEOUT;
        usleep(100);
    }
    return SUCCESS;
}

static int least(void) { return said("FAKE_CUDA_LEAST", 0); }
static int make_stream(Stream **stream, int priority) {
    /* As the driver does: what lies outside is moved to the nearest that there is. */
    int place = priority > least() ? PRIORITIES - 1 : priority <= least() - PRIORITIES ? 0 : PRIORITIES - 1 - (least() - priority);
    __atomic_add_fetch(&made_with[place], 1, __ATOMIC_SEQ_CST);
    *stream = calloc(1, sizeof **stream);
    return (*stream)->priority = priority, depth ? SUCCESS : INVALID_CONTEXT;
}
/* How many streams have been made so far: of the lowest priority, and of any other. */
void fake_cuda_streams(int *lowest, int *others) {
    *lowest = made_with[PRIORITIES - 1], *others = 0;
    for (int i = 0; i < PRIORITIES - 1; i++) *others += made_with[i];
}
int cuStreamCreate(Stream **stream, unsigned flags) { return make_stream(stream, 0); }
#ifndef OLD
int cuCtxGetStreamPriorityRange(int *lowest, int *highest) {
    return *lowest = least(), *highest = least() - PRIORITIES + 1, depth ? SUCCESS : INVALID_CONTEXT;
}
int cuStreamCreateWithPriority(Stream **stream, unsigned flags, int priority) { return make_stream(stream, priority); }
int cuStreamWriteValue32_v2(Stream *stream, Ptr at, uint32_t value, unsigned flags) {
    if (said("FAKE_CUDA_NO_WRITES", 0)) return NOT_SUPPORTED;
    __atomic_store_n((uint32_t *)(uintptr_t)at, value, __ATOMIC_SEQ_CST);
    return SUCCESS;
}
#endif
/* Kept: events may still ask about it. */
int cuStreamDestroy_v2(Stream *stream) { return __atomic_store_n(&stream->done, UINT64_MAX, __ATOMIC_SEQ_CST), SUCCESS; }
int cuStreamSynchronize(Stream *stream) { return wait_for(stream, issued(stream)); }
int cuStreamQuery(Stream *stream) { return is_done(stream, issued(stream)) ? SUCCESS : NOT_READY; }
int cuEventCreate(Event **event, unsigned flags) { return *event = calloc(1, sizeof **event), SUCCESS; }
int cuEventDestroy_v2(Event *event) { return free(event), SUCCESS; }
int cuEventRecord(Event *event, Stream *stream) { return *event = (Event){ stream, issued(stream) }, SUCCESS; }
int cuEventQuery(Event *event) { return is_done(event->stream, event->issued) ? SUCCESS : NOT_READY; }
int cuEventSynchronize(Event *event) { return wait_for(event->stream, event->issued); }
int cuModuleLoadData(void **module, const void *text) { return *module = malloc(1), SUCCESS; }
int cuModuleUnload(void *module) { return free(module), SUCCESS; }

typedef struct { Ptr src, dst; } Run;
typedef struct { Run runs[8]; unsigned count, chunks; } Few;
typedef struct { Ptr src, dst; unsigned len, rows, src_step, dst_step; } Rows;
typedef struct { Ptr address, head_stride, token_stride; unsigned heads, tokens, plane, token, content, sum; } Tile;

static const uint64_t GOLDEN = 0x9E3779B97F4A7C15ull;

static uint64_t scatter(unsigned plane, unsigned token) {
    uint64_t x = ((uint64_t)plane << 32 | token) + GOLDEN;
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9ull;
    x = (x ^ (x >> 27)) * 0x94D049BB133111EBull;
    return x ^ (x >> 31);
}
// The kernels copy no more than `chunks` of 4 KiB of an item.
static int copy_runs(const Run *runs, unsigned count, unsigned chunks) {
    const Ptr address = ((Ptr)1 << 48) - 1;
    for (const Run *run = runs; run < runs + count; run++) {
        Ptr len = run->src >> 48 | run->dst >> 48 << 16;
        int status = len > chunks * 4096ull ? INVALID_VALUE : cuMemcpyDtoD_v2(run->dst & address, run->src & address, len);
        if (status) return status;
    }
    return SUCCESS;
}
/* One block, whose warps take a chunk each, and which says itself that it is done. */
static int copy_few(const Few *few, uint32_t *word, uint32_t value, unsigned warps) {
    if (few->count > sizeof few->runs / sizeof *few->runs || few->count * few->chunks > warps) return INVALID_VALUE;
    int status = copy_runs(few->runs, few->count, few->chunks);
    if (!status) __atomic_store_n(word, value, __ATOMIC_SEQ_CST);
    return status;
}
static int copy_rows(const Rows *rows, unsigned count, unsigned chunks) {
    for (const Rows *of = rows; of < rows + count; of++) {
        if ((Ptr)of->len * of->rows > chunks * 4096ull) return INVALID_VALUE;
        for (unsigned row = 0; row < of->rows; row++) {
            int status = cuMemcpyDtoD_v2(of->dst + (Ptr)row * of->dst_step, of->src + (Ptr)row * of->src_step, of->len);
            if (status) return status;
        }
    }
    return SUCCESS;
}
static int digest_tiles(const Tile *tiles, unsigned count, uint64_t *sums) {
    for (const Tile *tile = tiles; tile < tiles + count; tile++)
        for (unsigned row = 0; row < tile->heads * tile->tokens; row++) {
            unsigned head = row % tile->heads, token = row / tile->heads;
            Ptr at = tile->address + head * tile->head_stride + token * tile->token_stride;
            if (!is_fixed(at, tile->content) && usable(at, tile->content)) return ILLEGAL_ADDRESS;
            uint64_t key = scatter(tile->plane + head, tile->token + token);
            for (unsigned done = 0; done < tile->content; done += 8, key += GOLDEN) {
                uint64_t word = 0, x;
                memcpy(&word, (void *)(uintptr_t)(at + done), tile->content - done < 8 ? tile->content - done : 8);
                x = word ^ key;
                sums[tile->sum] += (x & 0xFFFFFFFFull) * (x >> 32) + (word << 32 | word >> 32);
            }
        }
    return SUCCESS;
}

static const struct { const char *name; void *function; } kernels[] = {
    { "pdlink_copy_runs", copy_runs }, { "pdlink_copy_rows", copy_rows }, { "pdlink_copy_few", copy_few },
    { "pdlink_digest_tiles", digest_tiles },
};
/* Launches so far: of few runs, and others. */
static int launched_few, launched_others;
void fake_cuda_launches(int *few, int *others) { *few = launched_few, *others = launched_others; }

int cuModuleGetFunction(void **function, void *module, const char *name) {
    *function = NULL;
    for (size_t i = 0; i < sizeof kernels / sizeof *kernels; i++)
        if (!strcmp(name, kernels[i].name)) *function = kernels[i].function;
    return *function ? SUCCESS : INVALID_VALUE;
}
int cuLaunchKernel(void *function, unsigned x, unsigned y, unsigned z, unsigned tx, unsigned ty, unsigned tz, unsigned shared,
                   void *stream, void **arguments, void **extra) {
    if (!depth) return INVALID_CONTEXT;
    __atomic_add_fetch(function == (void *)copy_few ? &launched_few : &launched_others, 1, __ATOMIC_SEQ_CST);
    if (function == (void *)copy_few) {
        if (x * y * z * ty * tz != 1 || !tx || tx % 32 || tx > 1024) return INVALID_VALUE;
        return copy_few(arguments[0], *(uint32_t **)arguments[1], *(uint32_t *)arguments[2], tx / 32);
    }
    void *list = *(void **)arguments[0];
    unsigned count = *(unsigned *)arguments[1];
    if (function == (void *)copy_runs) return copy_runs(list, count, *(unsigned *)arguments[2]);
    if (function == (void *)copy_rows) return copy_rows(list, count, *(unsigned *)arguments[2]);
    return digest_tiles(list, count, *(uint64_t **)arguments[2]);
}

static const struct { int status; const char *name, *text; } answers[] = {
    { SUCCESS, "CUDA_SUCCESS", "no error" },
    { INVALID_VALUE, "CUDA_ERROR_INVALID_VALUE", "invalid argument" },
    { OUT_OF_MEMORY, "CUDA_ERROR_OUT_OF_MEMORY", "out of memory" },
    { NO_DEVICE, "CUDA_ERROR_NO_DEVICE", "no CUDA-capable device is detected" },
    { INVALID_DEVICE, "CUDA_ERROR_INVALID_DEVICE", "invalid device ordinal" },
    { INVALID_CONTEXT, "CUDA_ERROR_INVALID_CONTEXT", "invalid device context" },
    { PEERS_UNSUPPORTED, "CUDA_ERROR_PEER_ACCESS_UNSUPPORTED", "peer access is not supported between these two devices" },
    { INVALID_HANDLE, "CUDA_ERROR_INVALID_HANDLE", "invalid resource handle" },
    { NOT_READY, "CUDA_ERROR_NOT_READY", "device not ready" },
    { ILLEGAL_ADDRESS, "CUDA_ERROR_ILLEGAL_ADDRESS", "an illegal memory access was encountered" },
    { LAUNCH_TIMEOUT, "CUDA_ERROR_LAUNCH_TIMEOUT", "the launch timed out and was terminated" },
    { NOT_SUPPORTED, "CUDA_ERROR_NOT_SUPPORTED", "operation not supported" },
};
static int answer(int status) {
    for (size_t i = 0; i < sizeof answers / sizeof *answers; i++)
        if (answers[i].status == status) return i;
    return -1;
}
int cuGetErrorName(int status, const char **text) {
    int at = answer(status);
    return at < 0 ? INVALID_VALUE : (*text = answers[at].name, SUCCESS);
}
int cuGetErrorString(int status, const char **text) {
    int at = answer(status);
    return at < 0 ? INVALID_VALUE : (*text = answers[at].text, SUCCESS);
}
