/* A stand-in for libnccl.so.2 that moves host memory between two ranks over a socket, or from the first of several to all others. It keeps NCCL's habits that callers
 * must cope with: nothing ends at once, both halves must be posted in the same order, an abort ends what hangs, and errors
 * are found by asking. What to do wrong is set by fake_nccl_fail_at, and which version it is by FAKE_NCCL_VERSION.
 *
 * With streams it moves memory of a GPU's stand-in, which is the host's too, and tells that what is on them and when it is done. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <poll.h>
#include <pthread.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/random.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <unistd.h>

enum { SUCCESS, UNHANDLED_CUDA, SYSTEM_ERROR, INTERNAL, INVALID_ARGUMENT, INVALID_USAGE, REMOTE_ERROR, IN_PROGRESS };
enum { ID_BYTES = 128, TICK_MS = 5, QUEUE_MAX = 64, VERSION = 22809, RANKS_MAX = 16 };

typedef struct { char internal[ID_BYTES]; } ncclUniqueId;
typedef struct { size_t size; unsigned magic, version; int blocking, cga, min_ctas, max_ctas; const char *net; int share; } Config;
typedef struct { char half; void *place; size_t bytes; void *stream; } Op;
typedef struct Comm {
    pthread_t thread;
    pthread_mutex_t lock;
    pthread_cond_t work;
    Op queue[QUEUE_MAX];
    int queued, rank, ranks, stop, state, connected, blocking;
    struct sockaddr_un address;
    socklen_t address_len;
    /* Being made out of this one. */
    struct Comm *child;
} Comm;

/* The how manieth operation of that rank from now on fails, and how; 0: none. */
static int fail_rank, fail_countdown, fail_code;
static pthread_mutex_t fail_lock = PTHREAD_MUTEX_INITIALIZER;
static int living;

void fake_nccl_fail_at(int rank, int operations, int code) {
    pthread_mutex_lock(&fail_lock);
    fail_rank = rank, fail_countdown = operations, fail_code = code;
    pthread_mutex_unlock(&fail_lock);
}

/* Communicators that were made and not ended. */
int fake_nccl_living(void) { return __atomic_load_n(&living, __ATOMIC_SEQ_CST); }

static int injected(int rank) {
    pthread_mutex_lock(&fail_lock);
    int code = rank == fail_rank && fail_countdown > 0 && --fail_countdown == 0 ? fail_code : SUCCESS;
    pthread_mutex_unlock(&fail_lock);
    return code;
}

/* Tells the stand-in for the driver, which is in the process already if there are streams. */
static void tell(const char *name, void *stream) {
    if (!stream) return;
    void *driver = dlopen("libcuda.so.1", RTLD_NOW | RTLD_NOLOAD);
    void (*of_stream)(void *) = (void (*)(void *))dlsym(driver, name);
    of_stream(stream);
    dlclose(driver);
}

static int stopped(Comm *comm) { return __atomic_load_n(&comm->stop, __ATOMIC_SEQ_CST); }

static int ready(Comm *comm, int fd, short events) {
    while (!stopped(comm)) {
        struct pollfd polled = { fd, events, 0 };
        int n = poll(&polled, 1, TICK_MS);
        if (n > 0) return 1;
        if (n < 0 && errno != EINTR) return 0;
    }
    return 0;
}

static int push(Comm *comm, int fd, const void *bytes, size_t len) {
    for (const char *at = bytes; len;) {
        if (!ready(comm, fd, POLLOUT)) return 0;
        ssize_t n = send(fd, at, len, MSG_DONTWAIT | MSG_NOSIGNAL);
        if (n < 0 && (errno == EAGAIN || errno == EINTR)) continue;
        if (n <= 0) return 0;
        at += n, len -= n;
    }
    return 1;
}

static int pull(Comm *comm, int fd, void *bytes, size_t len) {
    for (char *at = bytes; len;) {
        if (!ready(comm, fd, POLLIN)) return 0;
        ssize_t n = recv(fd, at, len, MSG_DONTWAIT);
        if (n < 0 && (errno == EAGAIN || errno == EINTR)) continue;
        if (n <= 0) return 0;
        at += n, len -= n;
    }
    return 1;
}

/* The first rank sends, all others take: what is posted by one alone would hang in NCCL. */
static int spread(Comm *comm, const int *fds, Op op) {
    int ends = comm->rank ? 1 : comm->ranks - 1;
    for (int i = 0; i < ends; i++) {
        uint64_t ours = op.bytes, theirs;
        if (!push(comm, fds[i], &ours, sizeof ours) || !pull(comm, fds[i], &theirs, sizeof theirs)) return REMOTE_ERROR;
        if (ours != theirs) return INVALID_USAGE;
        if (!(comm->rank ? pull(comm, fds[i], op.place, op.bytes) : push(comm, fds[i], op.place, op.bytes))) return REMOTE_ERROR;
    }
    return SUCCESS;
}

/* Both ranks say which half they do and of how much: what does not fit together would hang in NCCL. */
static int move(Comm *comm, int fd, Op op) {
    uint64_t ours[2] = { op.half, op.bytes }, theirs[2];
    if (!push(comm, fd, ours, sizeof ours) || !pull(comm, fd, theirs, sizeof theirs)) return REMOTE_ERROR;
    if (theirs[0] == ours[0] || theirs[1] != ours[1]) {
        fprintf(stderr, "fake NCCL: rank %d does %c of %zu bytes, its peer %c of %zu\n", comm->rank, op.half, op.bytes,
                (char)theirs[0], (size_t)theirs[1]);
        return INVALID_USAGE;
    }
    int moved = op.half == 'S' ? push(comm, fd, op.place, op.bytes) : pull(comm, fd, op.place, op.bytes);
    return moved ? SUCCESS : REMOTE_ERROR;
}

/* To the first rank, or from all others: how many came. */
static int meet(Comm *comm, int *met) {
    int fd = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0), count = 0;
    if (fd < 0) return 0;
    if (comm->rank) {
        while (!stopped(comm)) {
            if (!connect(fd, (struct sockaddr *)&comm->address, comm->address_len)) return met[0] = fd, 1;
            usleep(1000);
        }
    } else if (!bind(fd, (struct sockaddr *)&comm->address, comm->address_len) && !listen(fd, RANKS_MAX)) {
        while (count < comm->ranks - 1 && ready(comm, fd, POLLIN)) {
            int one = accept4(fd, NULL, NULL, SOCK_CLOEXEC);
            if (one >= 0) met[count++] = one;
        }
    }
    close(fd);
    return count;
}

static void *run(void *with) {
    Comm *comm = with;
    int fds[RANKS_MAX], count = meet(comm, fds), wanted = comm->rank ? 1 : comm->ranks - 1;
    int state = count < wanted ? REMOTE_ERROR : SUCCESS;
    pthread_mutex_lock(&comm->lock);
    comm->connected = 1, comm->state = state;
    while (!stopped(comm) && state == SUCCESS) {
        if (!comm->queued) {
            pthread_cond_wait(&comm->work, &comm->lock);
            continue;
        }
        Op op = comm->queue[0];
        pthread_mutex_unlock(&comm->lock);
        state = injected(comm->rank);
        if (state == SUCCESS) state = op.half == 'B' ? spread(comm, fds, op) : move(comm, fds[0], op);
        if (state == SUCCESS) tell("fake_cuda_done", op.stream);
        pthread_mutex_lock(&comm->lock);
        if (state == SUCCESS) memmove(comm->queue, comm->queue + 1, sizeof(Op) * --comm->queued);
        comm->state = state;
    }
    pthread_mutex_unlock(&comm->lock);
    /* The other rank of NCCL would not notice either: only an abort ends it. */
    while (!stopped(comm)) usleep(TICK_MS * 1000);
    while (count) close(fds[--count]);
    return NULL;
}

int ncclGetVersion(int *version) {
    const char *said = getenv("FAKE_NCCL_VERSION");
    return *version = said ? atoi(said) : VERSION, SUCCESS;
}

int ncclGetUniqueId(ncclUniqueId *id) {
    memset(id, 0, sizeof *id);
    return getrandom(id->internal, 32, 0) == 32 ? SUCCESS : SYSTEM_ERROR;
}

static int fits(const Config *config) {
    return config->size == sizeof *config && config->magic == 0xcafebeef && config->version >= 21800;
}

static Comm *make(int rank, int ranks, int blocking, const char *name, size_t name_len) {
    Comm *comm = calloc(1, sizeof *comm);
    comm->rank = rank, comm->ranks = ranks, comm->blocking = blocking;
    comm->address.sun_family = AF_UNIX;
    /* An abstract name, which no file stands for. */
    memcpy(comm->address.sun_path + 1, name, name_len);
    comm->address_len = offsetof(struct sockaddr_un, sun_path) + 1 + name_len;
    pthread_mutex_init(&comm->lock, NULL);
    pthread_cond_init(&comm->work, NULL);
    __atomic_add_fetch(&living, 1, __ATOMIC_SEQ_CST);
    pthread_create(&comm->thread, NULL, run, comm);
    return comm;
}

int ncclCommInitRankConfig(Comm **made, int ranks, ncclUniqueId id, int rank, Config *config) {
    /* Blocking, it could not be given up. */
    if (ranks < 2 || ranks > RANKS_MAX || rank < 0 || rank >= ranks || !fits(config) || config->blocking != 0) return INVALID_ARGUMENT;
    int code = injected(rank);
    if (code != SUCCESS) return code;
    char name[65];
    for (int i = 0; i < 32; i++) sprintf(name + 2 * i, "%02x", (unsigned char)id.internal[i]);
    *made = make(rank, ranks, 0, name, 64);
    return IN_PROGRESS;
}

int ncclCommSplit(Comm *comm, int color, int key, Comm **made, Config *config) {
    if (color != 0 || key != comm->rank || !fits(config)) return INVALID_ARGUMENT;
    char name[66];
    memcpy(name, comm->address.sun_path + 1, 64);
    name[64] = 's';
    *made = comm->child = make(comm->rank, comm->ranks, config->blocking, name, 65);
    return IN_PROGRESS;
}

static int state_of(Comm *comm) {
    pthread_mutex_lock(&comm->lock);
    int state = comm->state != SUCCESS ? comm->state : comm->connected && !comm->queued ? SUCCESS : IN_PROGRESS;
    pthread_mutex_unlock(&comm->lock);
    return state;
}

int ncclCommGetAsyncError(Comm *comm, int *state) {
    *state = state_of(comm);
    if (*state == SUCCESS && comm->child) {
        *state = state_of(comm->child);
        /* From here on they have nothing to do with each other. */
        if (*state != IN_PROGRESS) comm->child = NULL;
    }
    return SUCCESS;
}

static int post(Comm *comm, Op op, int type, int peer) {
    if (type != 1 || (op.half == 'B' ? peer != 0 : comm->ranks != 2 || peer != 1 - comm->rank)) return INVALID_ARGUMENT;
    pthread_mutex_lock(&comm->lock);
    int code = comm->state != SUCCESS ? comm->state : comm->queued == QUEUE_MAX ? INVALID_USAGE : IN_PROGRESS;
    if (code == IN_PROGRESS) {
        tell("fake_cuda_issue", op.stream);
        comm->queue[comm->queued++] = op;
        pthread_cond_signal(&comm->work);
        if (comm->blocking) code = SUCCESS;
    }
    pthread_mutex_unlock(&comm->lock);
    return code;
}

int ncclSend(const void *from, size_t count, int type, int peer, Comm *comm, void *stream) {
    return post(comm, (Op){ 'S', (void *)from, count, stream }, type, peer);
}

int ncclRecv(void *into, size_t count, int type, int peer, Comm *comm, void *stream) {
    return post(comm, (Op){ 'R', into, count, stream }, type, peer);
}

int ncclBroadcast(const void *from, void *into, size_t count, int type, int root, Comm *comm, void *stream) {
    return post(comm, (Op){ 'B', comm->rank ? into : (void *)from, count, stream }, type, root);
}

int ncclCommAbort(Comm *comm) {
    __atomic_store_n(&comm->stop, 1, __ATOMIC_SEQ_CST);
    pthread_mutex_lock(&comm->lock);
    pthread_cond_signal(&comm->work);
    pthread_mutex_unlock(&comm->lock);
    pthread_join(comm->thread, NULL);
    /* What was posted and not done is off the stream from here on. */
    for (int i = 0; i < comm->queued; i++) tell("fake_cuda_done", comm->queue[i].stream);
    pthread_mutex_destroy(&comm->lock);
    pthread_cond_destroy(&comm->work);
    free(comm);
    __atomic_sub_fetch(&living, 1, __ATOMIC_SEQ_CST);
    return SUCCESS;
}

const char *ncclGetErrorString(int code) {
    static const char *texts[] = { "no error", "unhandled cuda error", "unhandled system error", "internal error",
                                   "invalid argument", "invalid usage", "remote process exited", "NCCL operation in progress" };
    return code >= 0 && code <= IN_PROGRESS ? texts[code] : "unknown";
}

const char *ncclGetLastError(Comm *comm) { return (void)comm, "made to fail"; }
