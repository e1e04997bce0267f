// Job file -> buffers -> dispatch -> result file and report file.
#include <sys/mman.h>

#include <algorithm>
#include <cstdarg>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <map>
#if defined(__SSE__)
#include <xmmintrin.h>
#endif

#include "dispatch.h"

namespace host {
Dispatch dispatch;
size_t threadgroup_bytes_peak = 0;
static std::map<std::string, std::pair<long, std::string>> findings;

void report(const char* kind, const char* format, ...) {
  auto& finding = findings[kind];
  if (finding.first++) return;
  char text[512];
  va_list arguments;
  va_start(arguments, format);
  vsnprintf(text, sizeof text, format, arguments);
  va_end(arguments);
  finding.second = text;
}
}  // namespace host

using namespace host;

namespace {

constexpr size_t kGuard = 1 << 20;  // readable bytes on both sides of a buffer

void read_bytes(FILE* file, void* to, size_t n) {
  if (n && fread(to, 1, n, file) != n) {
    fprintf(stderr, "the job file is too short\n");
    exit(3);
  }
}

// Of a huge output only its end is of interest.
bool has_end_only(const Buffer& b) {
  return dispatch.flags & kZeroPages && b.size > kGuard;
}

template <class T>
T read(FILE* file) {
  T value;
  read_bytes(file, &value, sizeof value);
  return value;
}

Buffer read_buffer(FILE* file) {
  Buffer b;
  b.output = read<uint32_t>(file);
  const auto item = read<uint32_t>(file);
  b.size = read<uint64_t>(file);
  const auto offset = read<uint64_t>(file), length = read<uint64_t>(file);
  const size_t shift = dispatch.flags & kMisalign ? item : 0;
  if (dispatch.flags & kHeap) {
    b.region_size = b.size + shift;
    b.region = static_cast<char*>(malloc(std::max<size_t>(b.region_size, 1)));
    b.base = b.region + shift;
  } else {
    b.region_size = 2 * kGuard + b.size + 64;
    b.region = static_cast<char*>(mmap(nullptr, b.region_size, PROT_READ | PROT_WRITE,
                                       MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0));
    if (b.region == MAP_FAILED) {
      perror("mmap");
      exit(3);
    }
    b.base = b.region + kGuard + shift;
    if (!(dispatch.flags & kZeroPages)) memset(b.region, 0xff, b.region_size);
  }
  if (b.output) {  // 0xff...: NaN in every float type
    const size_t poisoned = has_end_only(b) ? kGuard : b.size;
    memset(b.base + b.size - poisoned, 0xff, poisoned);
  }
  read_bytes(file, b.base + offset, length);
  return b;
}

void read_job(FILE* file) {
  std::string name(read<uint32_t>(file), '\0');
  read_bytes(file, &name[0], name.size());
  dispatch.kernel = nullptr;
  for (int i = 0; i < kernel_count; ++i)
    if (name == kernels[i].name) dispatch.kernel = &kernels[i];
  if (!dispatch.kernel) {
    fprintf(stderr, "no kernel %s\n", name.c_str());
    exit(3);
  }
  dispatch.grid = read<Triple>(file);
  dispatch.threadgroup = read<Triple>(file);
  // As MLX calls dispatchThreads: no threadgroup is larger than the grid.
  dispatch.threadgroup = {std::min(dispatch.threadgroup.x, dispatch.grid.x),
                          std::min(dispatch.threadgroup.y, dispatch.grid.y),
                          std::min(dispatch.threadgroup.z, dispatch.grid.z)};
  dispatch.first_group = read<uint32_t>(file);
  dispatch.last_group = read<uint32_t>(file);
  dispatch.seed = read<uint32_t>(file);
  dispatch.flags = read<uint32_t>(file);
  const auto count = read<uint32_t>(file);
  for (uint32_t i = 0; i < count; ++i) dispatch.buffers.push_back(read_buffer(file));
}

}  // namespace

// usage: program JOB OUTPUTS REPORT
int main(int argc, char** argv) {
  if (argc != 4) return 2;
  FILE* file = fopen(argv[1], "rb");
  if (!file) return 3;
  read_job(file);
  fclose(file);
#if defined(__SSE__)
  if (dispatch.flags & kFlushDenormals) _mm_setcsr(_mm_getcsr() | 0x8040);
#endif
  run_groups();
  file = fopen(argv[2], "wb");
  for (const Buffer& b : dispatch.buffers)
    if (b.output) {
      const size_t n = has_end_only(b) ? kGuard : b.size;
      fwrite(b.base + b.size - n, 1, n, file);
    }
  fclose(file);
  file = fopen(argv[3], "w");
  fprintf(file, "threadgroup_bytes\t%zu\n", threadgroup_bytes_peak);
  for (const auto& f : findings)
    fprintf(file, "finding\t%s\t%ld\t%s\n", f.first.c_str(), f.second.first,
            f.second.second.c_str());
  if (dispatch.flags & kCount) write_traffic(file);
  fclose(file);
  return findings.empty() ? 0 : 4;
}
