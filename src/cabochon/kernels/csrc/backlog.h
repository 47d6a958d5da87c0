// Work that is done while whoever wants it does something else: Python, while modules are imported.
//
// Pieces are taken in order, by threads of the backlog's own, and by whoever waits for a task.
#pragma once
#include <condition_variable>
#include <cstdint>
#include <deque>
#include <functional>
#include <mutex>
#include <thread>
#include <vector>

class Backlog {
 public:
  explicit Backlog(int threads);  // those of whoever waits are not among them
  ~Backlog();                     // what has not begun is forgotten

  // Have work(i) called for each i below `count`; returns a number to wait by.
  int64_t add(int count, std::function<void(int)> work);

  // Whether the task of this number is done, after working on it or before it for so long at most.
  bool wait(int64_t number, int milliseconds);

 private:
  struct Task {
    std::function<void(int)> work;
    int next, count, undone;
  };

  bool take(std::unique_lock<std::mutex>& lock);

  std::mutex mutex;
  std::condition_variable more, less;
  std::deque<Task> tasks;  // all that there ever were; references to them stay valid
  size_t first = 0;        // that has pieces which nobody has taken
  bool ending = false;
  std::vector<std::thread> threads;
};
