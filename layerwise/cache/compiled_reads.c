/* Reads the windows of a batch straight into its memory, without Python's lock, and compares the blocks that are read for
   the first time: what blocks.py does for one window.

   It vouches for what it has read and for nothing else. At the first window that it cannot vouch for, for whatever reason,
   it stops; the reader in Python reads that window again, and says what is wrong. */

#define Py_LIMITED_API 0x030B0000
#define PY_SSIZE_T_CLEAN
#include <Python.h>

#include <endian.h>
#include <stdint.h>
#include <string.h>
#include <sys/uio.h>
#include <unistd.h>

#define LONGEST_BLOCK 4096 /* bytes; the stack holds two of them */
#define CHECKSUMS 1024     /* that are looked up at once */

typedef uint32_t (*Checksum)(uint32_t before, const unsigned char *content, uint64_t size);

typedef struct {
    int descriptor;
    int64_t activations, checksums; /* where they begin in the file */
    int64_t size;                   /* bytes of all activations */
    int64_t row_bytes, block_bytes, chain_blocks;
    Checksum checksum;
    unsigned char *compared; /* a bit for each block, the lowest of a byte first */
} Cache;

static int64_t smaller(int64_t one, int64_t other) { return one < other ? one : other; }

static int is_compared(const Cache *cache, int64_t block) {
    return __atomic_load_n(&cache->compared[block / 8], __ATOMIC_RELAXED) >> block % 8 & 1;
}

static void set_compared(const Cache *cache, int64_t block) {
    __atomic_fetch_or(&cache->compared[block / 8], (unsigned char)(1 << block % 8), __ATOMIC_RELAXED);
}

/* Goes on from `before` over `size` bytes of the parts, without the first `skip`. */
static uint32_t checksum_of(const Cache *cache, const struct iovec *part, int64_t skip, int64_t size, uint32_t before) {
    for (; size > 0; part++) {
        int64_t length = smaller((int64_t)part->iov_len - skip, size);
        if (length > 0) {
            before = cache->checksum(before, (const unsigned char *)part->iov_base + skip, (uint64_t)length);
            size -= length, skip = 0;
        } else
            skip -= (int64_t)part->iov_len;
    }
    return before;
}

/* Whether blocks first to last match their checksums; the parts hold them, and begin at `start`. */
static int match(const Cache *cache, int64_t first, int64_t last, const struct iovec *parts, int64_t start) {
    uint32_t table[CHECKSUMS + 1]; /* and the one before */
    for (int64_t block = first, stop; block <= last; block = stop) {
        int64_t before = block > 0 ? block - 1 : 0;
        stop = smaller(block + CHECKSUMS, last + 1);
        ssize_t bytes = 4 * (stop - before);
        if (pread(cache->descriptor, table, (size_t)bytes, (off_t)(cache->checksums + 4 * before)) != bytes)
            return 0;
        for (int64_t link = block, end; link < stop; link = end) { /* what lies in one chain at a time */
            int64_t in_chain = link % cache->chain_blocks, position = link * cache->block_bytes;
            end = smaller(link - in_chain + cache->chain_blocks, stop);
            int64_t size = smaller(end * cache->block_bytes, cache->size) - position;
            uint32_t known = in_chain ? le32toh(table[link - 1 - before]) : 0;
            if (checksum_of(cache, parts, position - start, size, known) != le32toh(table[end - 1 - before]))
                return 0;
        }
    }
    return 1;
}

/* Rows from to, and zeros in what is left of the room; whether they are there and right. A first read is widened to whole
   blocks. */
static int read_window(const Cache *cache, int64_t first_row, int64_t stop_row, unsigned char *into, int64_t room) {
    unsigned char lead[LONGEST_BLOCK], tail[LONGEST_BLOCK];
    int64_t position = first_row * cache->row_bytes, stop = stop_row * cache->row_bytes, start = position, end = stop;
    if (position < 0 || position > stop || stop > cache->size || stop - position > room)
        return 0;
    memset(into + (stop - position), 0, (size_t)(room - (stop - position)));
    if (position == stop)
        return 1;
    int64_t size = cache->block_bytes, first = position / size, last = (stop - 1) / size;
    while (first <= last && is_compared(cache, first))
        first++;
    while (last > first && is_compared(cache, last))
        last--;
    if (first <= last) {
        start = smaller(first * size, position);
        end = last == (stop - 1) / size ? smaller((last + 1) * size, cache->size) : stop;
    }
    struct iovec parts[] = {
        {lead, (size_t)(position - start)}, {into, (size_t)(stop - position)}, {tail, (size_t)(end - stop)}};
    if (preadv(cache->descriptor, parts, 3, (off_t)(cache->activations + start)) != end - start)
        return 0;
    if (first <= last && !match(cache, first, last, parts, start))
        return 0;
    for (int64_t block = first; block <= last; block++)
        set_compared(cache, block);
    return 1;
}

static PyObject *read_windows(PyObject *module, PyObject *arguments) {
    (void)module;
    long long activations, checksums, size, row_bytes, block_bytes, chain_blocks, stride;
    unsigned long long checksum;
    int descriptor;
    Py_buffer compared, rows, into;
    if (!PyArg_ParseTuple(arguments, "(iLLLLLLK)w*y*w*L:read_windows", &descriptor, &activations, &checksums, &size,
                          &row_bytes, &block_bytes, &chain_blocks, &checksum, &compared, &rows, &into, &stride))
        return NULL;
    Cache cache = {descriptor,  activations,  checksums, size, row_bytes, block_bytes,
                   chain_blocks, (Checksum)(uintptr_t)checksum, compared.buf};
    const int64_t *bounds = rows.buf;
    int64_t windows = stride > 0 ? smaller(rows.len / 16, into.len / stride) : 0, done = 0;
    int usual = block_bytes >= 1 && block_bytes <= LONGEST_BLOCK && chain_blocks >= 1 && size <= 8 * compared.len * block_bytes;
    Py_BEGIN_ALLOW_THREADS;
    if (usual)
        while (done < windows &&
               read_window(&cache, bounds[2 * done], bounds[2 * done + 1], (unsigned char *)into.buf + done * stride, stride))
            done++;
    Py_END_ALLOW_THREADS;
    PyBuffer_Release(&compared);
    PyBuffer_Release(&rows);
    PyBuffer_Release(&into);
    return PyLong_FromLongLong(done);
}

static PyMethodDef methods[] = {{"read_windows", read_windows, METH_VARARGS, NULL}, {NULL, NULL, 0, NULL}};
static struct PyModuleDef definition = {PyModuleDef_HEAD_INIT, "compiled_reads", NULL, 0, methods, NULL, NULL, NULL, NULL};
PyMODINIT_FUNC PyInit_compiled_reads(void) { return PyModuleDef_Init(&definition); }
