// The part of OpenMP's runtime that the kernels' pragmas call, compiled with the sanitizer: of libgomp, which is not,
// ThreadSanitizer cannot see how its threads wait for each other.
//
// Iterations of a dynamic loop are dealt by a rule, another one in every region. So every thread has its part, however
// busy the machine is, and nothing but the pragmas' own barriers orders what two threads do: a lock around a common
// counter would hide races between the iterations.
#include <pthread.h>

#include <algorithm>
#include <condition_variable>
#include <cstdlib>
#include <mutex>
#include <thread>
#include <tuple>
#include <vector>

namespace {

class Barrier {
 public:
  void wait(int threads) {
    std::unique_lock<std::mutex> lock(mutex_);
    if (++arrived_ == threads) {
      arrived_ = 0;
      ++generation_;
      all_here_.notify_all();
    } else {
      all_here_.wait(lock, [this, before = generation_] { return generation_ != before; });
    }
  }

 private:
  std::mutex mutex_;
  std::condition_variable all_here_;
  int arrived_ = 0;
  unsigned generation_ = 0;
};

class Team;

// What a thread knows of the region that it is in. Chunk c of a loop begins at begin + c * step.
struct Place {
  Team* team = nullptr;
  int number = 0, threads = 1;
  long region = 0, begin = 0, end = 0, step = 1, round = 0;
};
thread_local Place here;

// The threads that one caller starts, kept for its next regions.
class Team {
 public:
  ~Team() {
    fork(nullptr, nullptr, static_cast<int>(workers_.size()) + 1);
    for (std::thread& worker : workers_) worker.join();
  }

  void run(void (*body)(void*), void* data, int threads) {
    if (here.team) std::abort();  // no kernel has regions within regions
    pthread_attr_t attributes;
    pthread_attr_init(&attributes);
    pthread_attr_setstacksize(&attributes, size_t{64} << 20);  // thread_local tiles lie on it
    pthread_setattr_default_np(&attributes);
    for (int number = static_cast<int>(workers_.size()) + 1; number < threads; ++number)
      workers_.emplace_back([this, number, region = region_] { work(number, region); });
    fork(body, data, threads);
    here = {this, 0, threads, region_};
    body(data);
    barrier();
    here = {};
  }

  void barrier() { barrier_.wait(here.threads); }

 private:
  void fork(void (*body)(void*), void* data, int threads) {
    const std::lock_guard<std::mutex> lock(mutex_);
    body_ = body;
    data_ = data;
    threads_ = threads;
    ++region_;
    forked_.notify_all();
  }

  void work(int number, long region) {
    for (;;) {
      std::unique_lock<std::mutex> lock(mutex_);
      forked_.wait(lock, [&] { return region_ != region; });
      region = region_;
      const auto [body, data, threads] = std::tuple{body_, data_, threads_};
      lock.unlock();
      if (number >= threads) continue;
      if (!body) return;
      here = {this, number, threads, region};
      body(data);
      barrier();
    }
  }

  std::vector<std::thread> workers_;
  std::mutex mutex_;
  std::condition_variable forked_;
  void (*body_)(void*) = nullptr;  // null: the workers end
  void* data_ = nullptr;
  int threads_ = 0;
  long region_ = 0;
  Barrier barrier_;
};

}  // namespace

extern "C" {

int omp_get_num_threads() { return here.threads; }
int omp_get_thread_num() { return here.number; }

void GOMP_parallel(void (*body)(void*), void* data, unsigned threads, unsigned) {
  static thread_local Team team;
  team.run(body, data, static_cast<int>(threads));
}

void GOMP_barrier() { here.team->barrier(); }

// Each round deals one chunk to every thread.
bool GOMP_loop_nonmonotonic_dynamic_next(long* begin, long* end) {
  const long mine = here.round * here.threads + (here.number + here.round * here.region) % here.threads;
  ++here.round;
  *begin = here.begin + mine * here.step;
  *end = std::min(*begin + here.step, here.end);
  return *begin < here.end;
}

bool GOMP_loop_nonmonotonic_dynamic_start(long begin, long end, long step, long chunk, long* from, long* to) {
  if (step < 1) std::abort();  // no kernel's loop runs down
  here.begin = begin;
  here.end = end;
  here.step = step * chunk;
  here.round = 0;
  return GOMP_loop_nonmonotonic_dynamic_next(from, to);
}

void GOMP_loop_end() { here.team->barrier(); }
void GOMP_loop_end_nowait() {}

}  // extern "C"
