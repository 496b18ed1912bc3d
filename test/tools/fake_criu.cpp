// SPDX-License-Identifier: GPL-2.0-only
// Stands in for stock criu: prints how it was started and then does as the environment says.
//   FAKE_CRIU_REPORT=FILE  print there instead of to stdout
//   FAKE_CRIU_LOG=TEXT     write TEXT to the log file of -o, in the directory of -D
//   FAKE_CRIU_PID=N        write N to the file of --pidfile
//   FAKE_CRIU_READY=FIFO   write a byte there, then wait for a signal
//   FAKE_CRIU_SIGNAL=N     die of signal N
//   FAKE_CRIU_EXIT=N       exit with N

#include <dirent.h>
#include <fcntl.h>
#include <signal.h>
#include <unistd.h>

#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <string>

namespace {

std::string value_of(int argc, char** argv, const char* option) {
  for (int i = 1; i + 1 < argc; i++) {
    if (strcmp(argv[i], option) == 0) return argv[i + 1];
  }
  return "";
}

void report(FILE* out, int argc, char** argv) {
  for (int i = 0; i < argc; i++) fprintf(out, "arg %s\n", argv[i]);
  const char* dir = getenv("CRIU_LIBS_DIR");
  fprintf(out, "CRIU_LIBS_DIR %s\n", dir ? dir : "(unset)");
  fprintf(out, "pid %d\n", getpid());
  for (int fd = 3; fd < 64; fd++) {
    if (fd != fileno(out) && fcntl(fd, F_GETFD) >= 0) fprintf(out, "fd %d\n", fd);
  }
  if (!isatty(STDIN_FILENO)) {
    char line[256];
    while (fgets(line, sizeof line, stdin)) fprintf(out, "stdin %s", line);
  }
  fflush(out);
}

void write_file(const std::string& path, const char* text) {
  if (FILE* f = fopen(path.c_str(), "w")) {
    fputs(text, f);
    fclose(f);
  }
}

void on_signal(int) {}

}  // namespace

int main(int argc, char** argv) {
  const char* to = getenv("FAKE_CRIU_REPORT");
  FILE* out = to ? fopen(to, "w") : stdout;
  if (!out) return 99;
  report(out, argc, argv);
  if (const char* text = getenv("FAKE_CRIU_LOG")) {
    write_file(value_of(argc, argv, "-D") + "/" + value_of(argc, argv, "-o"), text);
  }
  if (const char* pid = getenv("FAKE_CRIU_PID")) {
    write_file(value_of(argc, argv, "--pidfile"), pid);
  }
  if (const char* fifo = getenv("FAKE_CRIU_READY")) {
    // Blocked until sigsuspend, so that a signal cannot come before the wait for it.
    sigset_t block, none;
    sigemptyset(&none);
    sigfillset(&block);
    sigprocmask(SIG_BLOCK, &block, nullptr);
    signal(SIGTERM, on_signal);
    signal(SIGINT, on_signal);
    int fd = open(fifo, O_WRONLY);
    if (fd < 0 || write(fd, "x", 1) != 1) return 98;
    close(fd);
    sigsuspend(&none);
    return 1;
  }
  if (const char* number = getenv("FAKE_CRIU_SIGNAL")) {
    signal(atoi(number), SIG_DFL);
    raise(atoi(number));
  }
  const char* code = getenv("FAKE_CRIU_EXIT");
  return code ? atoi(code) : 0;
}
