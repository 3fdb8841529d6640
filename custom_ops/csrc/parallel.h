// Independent tasks over XLA's own thread pool, so that no second pool competes for the cores.
#pragma once

#include <algorithm>
#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <exception>
#include <memory>
#include <mutex>

#include "xla/ffi/api/ffi.h"

namespace moejax {

// Calls task(0) ... task(count - 1), each once, on the calling thread and on idle threads of the pool.
//
// The caller takes tasks itself until none is left and then waits for those that others have begun. It never waits
// for a thread to become free, so it cannot deadlock when all threads of the pool are in such calls. What a task throws
// is thrown here, once nothing runs any more.
template <typename Task>
void parallel_for(xla::ffi::ThreadPool& pool, int64_t count, const Task& task) {
  const int64_t helpers = std::min<int64_t>(pool.num_threads(), count) - 1;
  if (helpers <= 0) {
    for (int64_t i = 0; i < count; ++i) task(i);
    return;
  }

  struct Shared {
    std::atomic<int64_t> next{0};
    std::atomic<int64_t> done{0};
    std::mutex mutex;
    std::condition_variable all_done;
    std::exception_ptr thrown;  // by whichever task was first
  };
  // A helper that is scheduled too late finds no task; it may outlive this call, hence the shared ownership. `task` is
  // only touched while a task is open, so while the caller still waits.
  auto shared = std::make_shared<Shared>();
  auto work = [shared, count, &task] {
    int64_t finished = 0;
    for (int64_t i; (i = shared->next.fetch_add(1)) < count; ++finished) {
      try {
        task(i);
      } catch (...) {
        std::lock_guard<std::mutex> lock(shared->mutex);
        if (!shared->thrown) shared->thrown = std::current_exception();
      }
    }
    if (finished > 0 && shared->done.fetch_add(finished) + finished == count) {
      std::lock_guard<std::mutex> lock(shared->mutex);
      shared->all_done.notify_one();
    }
  };
  for (int64_t i = 0; i < helpers; ++i) pool.Schedule(decltype(work)(work));
  work();
  std::unique_lock<std::mutex> lock(shared->mutex);
  shared->all_done.wait(lock, [&] { return shared->done.load() == count; });
  if (shared->thrown) std::rethrow_exception(shared->thrown);
}

}  // namespace moejax
