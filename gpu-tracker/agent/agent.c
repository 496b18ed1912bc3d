/* SPDX-License-Identifier: GPL-2.0-only */
/*
 * The agent's life: loaded by a dlopen() that phosd runs on the driver's restore thread, it makes
 * its mailbox and starts its thread from the constructor. There is no destructor: it would run at
 * every exit() of the process and of its forked children, which have no mailbox.
 */
#include "gpu-tracker/agent/agent.h"

#include <dlfcn.h>
#include <fcntl.h>
#include <linux/memfd.h>
#include <pthread.h>
#include <signal.h>
#include <sys/mman.h>
#include <sys/prctl.h>

#include "gpu-tracker/agent/hooks.h"
#include "gpu-tracker/agent/steer.h"
#include "gpu-tracker/agent/sys.h"
#include "gpu-tracker/agent/table.h"

#define STACK_SIZE (512u << 10)
#define GUARD_SIZE 4096u

/* Of linux/fcntl.h, which cannot be included beside fcntl.h. */
#define ADD_SEALS 1033          /* F_ADD_SEALS */
#define SEALS (0x1 | 0x2 | 0x4) /* F_SEAL_SEAL, F_SEAL_SHRINK, F_SEAL_GROW */

/* phosd writes into this before the library is loaded; hence volatile. */
static volatile struct phos_agent_config g_config = {.magic = PHOS_AGENT_CONFIG_MAGIC};

static struct phos_mailbox* g_mailbox;
static struct driver g_driver;
static char* g_stack;
static pthread_t g_thread;
static bool g_has_thread;

/* What mallinfo2(), or mallinfo(), fills in: no more than that. */
struct malloc_info {
  uint64_t of_no_interest[10];
};

struct c_library {
  void* (*dlopen)(const char*, int);
  void* (*dlsym)(void*, const char*);
  int (*dlclose)(void*);
  int (*dladdr1)(const void*, Dl_info*, void**, int);
  int (*attr_init)(pthread_attr_t*);
  int (*attr_setstack)(pthread_attr_t*, void*, size_t);
  int (*attr_destroy)(pthread_attr_t*);
  int (*create)(pthread_t*, const pthread_attr_t*, void* (*)(void*), void*);
  int (*join)(pthread_t, void**);
  struct malloc_info (*malloc_info)(void);
};
static struct c_library g_libc;
__attribute__((used)) static int (*g_dlclose)(void*); /* for finish() */

static void set_state(uint32_t state) {
  __atomic_store_n(&g_mailbox->state, state, __ATOMIC_RELEASE);
  futex_wake_all(&g_mailbox->state);
}

/* Nothing of the process may need the agent any more. */
static int may_leave(const struct phos_mailbox* m) {
  if (m->gate.signal) return PHOS_RESULT_GATE_BUSY;
  if (holds_memory()) return PHOS_RESULT_IN_USE;
  steer_place_copy(false); /* what could not be put back then */
  return steer_is_in_place() ? PHOS_RESULT_IN_USE : PHOS_RESULT_OK;
}

/*
 * The C library's allocator locks all of its arenas, one after the other, to count what is in them:
 * so none is locked by a thread that is frozen, and would never be unlocked, once this has
 * returned. A process with another allocator, or C library, is not known to be free of such.
 */
static void wait_for_locks(void) {
  if (g_libc.malloc_info) (void)g_libc.malloc_info();
}

static void execute(struct phos_mailbox* m) {
  const uint64_t start = monotonic_ns();
  m->driver_result = 0;
  switch (m->command) {
    case PHOS_COMMAND_ENUMERATE:
      m->result = run_enumerate(&g_driver, m);
      break;
    case PHOS_COMMAND_EXPORT:
      m->result = run_export(&g_driver, m);
      break;
    case PHOS_COMMAND_CLOSE:
      close_exports();
      m->result = PHOS_RESULT_OK;
      break;
    case PHOS_COMMAND_EXIT:
      close_exports();
      m->result = may_leave(m);
      break;
    case PHOS_COMMAND_RELEASE:
      m->result = run_release(&g_driver, m);
      break;
    case PHOS_COMMAND_MAP_BACK:
      m->result = run_map_back(&g_driver, m);
      break;
    case PHOS_COMMAND_RELEASED:
      m->result = run_released(&g_driver, m);
      break;
    case PHOS_COMMAND_LOADED:
      m->result = run_loaded(&g_driver, m);
      break;
    case PHOS_COMMAND_EMPTY_COPIES:
      m->result = run_empty_copies(m);
      break;
    case PHOS_COMMAND_READ:
      m->result = run_read(&g_driver, m);
      break;
    case PHOS_COMMAND_LOAD:
      m->result = run_load(&g_driver, m);
      break;
    case PHOS_COMMAND_TAKE_AWAY:
      m->result = run_take_away(&g_driver, m);
      break;
    case PHOS_COMMAND_NO_LOCKS:
      wait_for_locks();
      m->result = PHOS_RESULT_OK;
      break;
    case PHOS_COMMAND_GATE_INSTALL:
      m->result = gate_install(m);
      break;
    case PHOS_COMMAND_GATE_REMOVE:
      m->result = gate_remove(m);
      break;
    case PHOS_COMMAND_GATE_FORGET:
      m->result = gate_forget(m);
      break;
    default:
      m->result = PHOS_RESULT_BAD_COMMAND;
  }
  m->hooks_page = hooks_page();
  m->nanoseconds = monotonic_ns() - start;
}

/*
 * Blocks all signals but the C library's own (SIGCANCEL, SIGSETXID): setuid() of any thread waits
 * until every thread has handled SIGSETXID. The thread that loaded us had them all blocked.
 */
static void block_signals(void) {
  const uint64_t mask = ~((1ull << 31) | (1ull << 32));
  sys6(SYS_rt_sigprocmask, SIG_SETMASK, (long)&mask, 0, sizeof mask, 0, 0);
}

static void* serve(void* unused) {
  (void)unused;
  struct phos_mailbox* m = g_mailbox;
  block_signals();
  sys3(SYS_prctl, PR_SET_NAME, (long)PHOS_AGENT_THREAD_NAME, 0);
  m->thread_id = (int32_t)sys3(SYS_gettid, 0, 0, 0);
  set_state(PHOS_AGENT_READY);
  for (uint32_t done = 0;;) {
    const uint32_t wanted = __atomic_load_n(&m->command_seq, __ATOMIC_ACQUIRE);
    if (wanted == done) {
      futex_wait(&m->command_seq, done);
      continue;
    }
    const bool exit = m->command == PHOS_COMMAND_EXIT;
    execute(m);
    const bool last = exit && m->result == PHOS_RESULT_OK;
    done = wanted;
    if (last) set_state(PHOS_AGENT_ENDED);
    __atomic_store_n(&m->done_seq, done, __ATOMIC_RELEASE);
    futex_wake_all(&m->done_seq);
    if (last) return NULL;
  }
}

/* Frees everything but the library itself, whose handle it returns (0: it is to stay). */
__attribute__((used, noinline)) static uint64_t release(void) {
  struct phos_mailbox* m = g_mailbox;
  if (!m) return 0;
  g_mailbox = NULL;
  const uint64_t library = gate_was_used() ? 0 : m->library_handle;
  if (g_has_thread) g_libc.join(g_thread, NULL);
  if (g_stack) sys3(SYS_munmap, (long)g_stack, STACK_SIZE + GUARD_SIZE, 0);
  table_drop();
  hooks_drop();
  if (m->libcuda_handle) g_libc.dlclose((void*)m->libcuda_handle);
  sys3(SYS_munmap, (long)m, (long)PHOS_MAILBOX_SIZE, 0);
  return library;
}

/*
 * Called by phosd on the restore thread, once ENDED or FAILED. Ends in dlclose() of the library by
 * a jump: then there is no code here to come back to, and the caller need not survive until a
 * second call.
 */
__attribute__((naked)) static void finish(void) {
  __asm__(
      "sub $8, %rsp\n"
      "call release\n"
      "add $8, %rsp\n"
      "test %rax, %rax\n"
      "je 1f\n"
      "mov %rax, %rdi\n"
      "jmp *g_dlclose(%rip)\n"
      "1: ret\n");
}

/* Writes the header before the file is mapped: a mailbox in /proc/PID/maps is one that is valid. */
static long write_header(int fd) {
  const struct {
    uint64_t magic;
    uint32_t version, header_size;
    uint64_t total_size;
  } head = {PHOS_MAILBOX_MAGIC, PHOS_MAILBOX_VERSION, PHOS_MAILBOX_PAYLOAD, PHOS_MAILBOX_SIZE};
  _Static_assert(sizeof head == offsetof(struct phos_mailbox, state), "all up to the state");
  const long written = sys6(SYS_pwrite64, fd, (long)&head, sizeof head, 0, 0, 0);
  return written == sizeof head ? 0 : -1;
}

/* Sealed, so that nothing can take the pages away from under phosd's mapping. */
static struct phos_mailbox* make_mailbox(void) {
  const int fd =
      (int)sys3(SYS_memfd_create, (long)PHOS_MAILBOX_NAME, MFD_CLOEXEC | MFD_ALLOW_SEALING, 0);
  if (fd < 0) return NULL;
  long at = sys3(SYS_ftruncate, fd, (long)PHOS_MAILBOX_SIZE, 0);
  if (at == 0) at = write_header(fd);
  if (at == 0) at = sys3(SYS_fcntl, fd, ADD_SEALS, SEALS);
  if (at == 0) {
    at = sys6(SYS_mmap, 0, (long)PHOS_MAILBOX_SIZE, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
  }
  sys3(SYS_close, fd, 0, 0);
  return sys_failed(at) ? NULL : (struct phos_mailbox*)at;
}

/* The first of the C library's files that has `name`: before glibc 2.34 there were several. */
static void* find_in_libc(const char* name) {
  static const char* const kFiles[] = {"libc.so.6", "libpthread.so.0", "libdl.so.2"};
  for (size_t i = 0; i < sizeof kFiles / sizeof kFiles[0]; i++) {
    void* handle = g_libc.dlopen(kFiles[i], RTLD_LAZY | RTLD_NOLOAD);
    if (!handle) continue;
    void* found = g_libc.dlsym(handle, name);
    if (g_libc.dlclose) g_libc.dlclose(handle);
    if (found) return found;
  }
  return NULL;
}

static bool load_c_library(void) {
  struct c_library* c = &g_libc;
  c->dlopen = (void* (*)(const char*, int))g_config.dlopen;
  c->dlsym = (void* (*)(void*, const char*))g_config.dlsym;
  c->dlclose = find_in_libc("dlclose");
  g_dlclose = c->dlclose;
  c->dladdr1 = find_in_libc("dladdr1");
  c->attr_init = find_in_libc("pthread_attr_init");
  c->attr_setstack = find_in_libc("pthread_attr_setstack");
  c->attr_destroy = find_in_libc("pthread_attr_destroy");
  c->create = find_in_libc("pthread_create");
  c->join = find_in_libc("pthread_join");
  c->malloc_info = find_in_libc("mallinfo2");
  if (!c->malloc_info) c->malloc_info = find_in_libc("mallinfo");
  return c->dlclose && c->dladdr1 && c->attr_init && c->attr_setstack && c->attr_destroy &&
         c->create && c->join;
}

static int start_thread(void) {
  pthread_attr_t attributes;
  int error = g_libc.attr_init(&attributes);
  if (error) return error;
  error = g_libc.attr_setstack(&attributes, g_stack + GUARD_SIZE, STACK_SIZE);
  if (!error) error = g_libc.create(&g_thread, &attributes, serve, NULL);
  g_libc.attr_destroy(&attributes);
  g_has_thread = !error;
  return error;
}

/* Returns a phos_agent_start_step, with *code. */
static uint32_t begin(struct phos_mailbox* m, int32_t* code) {
  *code = 0;
  if (!load_c_library()) return PHOS_START_PTHREADS;
  Dl_info info;
  void* self = NULL;
  /* A handle of glibc's dlopen() is the library's link_map. */
  if (g_libc.dladdr1((const void*)serve, &info, &self, RTLD_DL_LINKMAP)) {
    m->library_handle = (uint64_t)self;
  }
  void* libcuda = g_libc.dlopen("libcuda.so.1", RTLD_LAZY | RTLD_NOLOAD);
  m->libcuda_handle = (uint64_t)libcuda;
  if (!libcuda) return PHOS_START_LIBCUDA;
  *code = driver_load(&g_driver, g_libc.dlsym, libcuda);
  if (*code >= 0) return PHOS_START_SYMBOL;
  hooks_find(&g_driver, g_libc.dlsym, libcuda);
  steer_find(find_in_libc("dlinfo"), find_in_libc("__errno_location"), libcuda);
  /* Of our own, not the C library's, which would keep it in a cache. */
  const long stack = sys6(SYS_mmap, 0, STACK_SIZE + GUARD_SIZE, PROT_READ | PROT_WRITE,
                          MAP_PRIVATE | MAP_ANONYMOUS | MAP_STACK, -1, 0);
  *code = (int32_t)-stack;
  if (sys_failed(stack)) return PHOS_START_STACK;
  g_stack = (char*)stack;
  sys3(SYS_mprotect, stack, GUARD_SIZE, PROT_NONE);
  *code = start_thread();
  return *code ? PHOS_START_THREAD : PHOS_START_DONE;
}

__attribute__((constructor)) static void start(void) {
  if (!g_config.dlopen || g_config.version != PHOS_MAILBOX_VERSION) return;
  struct phos_mailbox* m = make_mailbox();
  if (!m) return;
  g_mailbox = m;
  m->finish_function = (uint64_t)finish;

  int32_t code = 0;
  uint32_t step = PHOS_START_MAILBOX;
  /* A forked child has neither our thread nor any business with the mailbox. */
  const long advised = sys3(SYS_madvise, (long)m, (long)PHOS_MAILBOX_SIZE, MADV_DONTFORK);
  if (advised == 0) {
    step = begin(m, &code);
  } else {
    code = (int32_t)-advised;
  }
  if (step == PHOS_START_DONE) return;
  m->start_step = step;
  m->start_code = code;
  set_state(PHOS_AGENT_FAILED);
}
