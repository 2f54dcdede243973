// Work in parts on XLA's own threads.
//
// oneDNN would bring a second set of threads (OpenMP's), which spin while XLA's want the cores.
// Here every part is computed by one thread, and the threads are those that XLA runs everything
// else on: as many as XLA has (NPROC, the cores of the process), and no more of them awake.

#ifndef BNRESEARCH_PARTS_H_
#define BNRESEARCH_PARTS_H_

#include <algorithm>
#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <exception>
#include <memory>
#include <mutex>
#include <string>

#include <sys/mman.h>

#include "xla/ffi/api/ffi.h"

namespace bnresearch {

namespace ffi = xla::ffi;

struct Job {
  std::atomic<int64_t> next{0};
  std::atomic<int64_t> left;
  int64_t parts;
  std::mutex mutex;
  std::condition_variable finished;
  std::exception_ptr failure;
};

// Takes parts until there are none. A thread of the pool that comes too late finds none, and never
// touches `body`, which lives as long as the caller waits.
template <typename Body>
void Take(Job& job, const Body* body) {
  for (int64_t part; (part = job.next.fetch_add(1)) < job.parts;) {
    try {
      (*body)(part);
    } catch (...) {
      std::lock_guard<std::mutex> lock(job.mutex);
      if (!job.failure) job.failure = std::current_exception();
    }
    if (job.left.fetch_sub(1) == 1) {
      std::lock_guard<std::mutex> lock(job.mutex);
      job.finished.notify_all();
    }
  }
}

// body(0), ..., body(parts - 1), in any order, on the caller and on threads of the pool. The caller
// takes parts itself and waits only for parts that somebody is computing: with every thread of the
// pool in here at once, nobody waits for a task in the queue.
template <typename Body>
void InParts(ffi::ThreadPool& pool, int64_t parts, const Body& body) {
  int64_t helpers = std::min(parts, pool.num_threads()) - 1;
  if (helpers < 1) {
    for (int64_t part = 0; part < parts; ++part) body(part);
    return;
  }
  auto job = std::make_shared<Job>();
  job->left = parts;
  job->parts = parts;
  const Body* pointer = &body;
  for (int64_t i = 0; i < helpers; ++i) {
    pool.Schedule([job, pointer]() { Take(*job, pointer); });
  }
  Take(*job, pointer);
  // The last parts end at nearly the same time: sleeping would cost more than they take.
  for (int spin = 0; spin < 20000 && job->left.load() > 0; ++spin) {
#if defined(__x86_64__)
    __builtin_ia32_pause();
#endif
  }
  std::unique_lock<std::mutex> lock(job->mutex);
  job->finished.wait(lock, [&] { return job->left.load() == 0; });
  if (job->failure) std::rethrow_exception(job->failure);
}

// Into how many parts to cut `count` things that are `work` operations in all: a few per thread, so
// that one that is held up holds up little; one, where cutting costs more than it gains.
inline int64_t PartsFor(const ffi::ThreadPool& pool, int64_t count, double work) {
  constexpr double kSmallest = 1e6;
  constexpr int64_t kPerThread = 4;
  int64_t threads = std::max<int64_t>(1, pool.num_threads());
  if (threads == 1) return 1;
  int64_t most = std::min<int64_t>(threads * kPerThread, static_cast<int64_t>(work / kSmallest));
  return std::max<int64_t>(1, std::min(count, most));
}

// XLA asks the system for new memory at every run of a program, and gives it back: a step of a net
// touches tens of thousands of new pages, which takes as long as a third of its arithmetic. With
// pages of 2 MiB it is next to nothing. It is a hint, so it may cover the edges of neighbours.
inline void AskForLargePages(const void* start, size_t bytes) {
#ifdef MADV_HUGEPAGE
  constexpr uintptr_t kPage = 2 << 20;
  uintptr_t first = reinterpret_cast<uintptr_t>(start) / kPage * kPage;
  uintptr_t last = (reinterpret_cast<uintptr_t>(start) + bytes + kPage - 1) / kPage * kPage;
  if (first < last) madvise(reinterpret_cast<void*>(first), last - first, MADV_HUGEPAGE);
#endif
}

// An exception must not leave a call from XLA.
template <typename Body>
ffi::Error Guarded(const char* who, const Body& body) {
  try {
    body();
    return ffi::Error::Success();
  } catch (const std::exception& error) {
    return ffi::Error::Internal(std::string(who) + ": " + error.what());
  }
}

}  // namespace bnresearch

#endif  // BNRESEARCH_PARTS_H_
