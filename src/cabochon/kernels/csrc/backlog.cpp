#include "backlog.h"

#include <chrono>
#include <utility>

Backlog::Backlog(int count) {
  for (int i = 0; i < count; i++)
    threads.emplace_back([this] {
      std::unique_lock<std::mutex> lock(mutex);
      while (!ending)
        if (!take(lock)) more.wait(lock);
    });
}

Backlog::~Backlog() {
  {
    std::lock_guard<std::mutex> lock(mutex);
    ending = true;
  }
  more.notify_all();
  for (std::thread& thread : threads) thread.join();
}

int64_t Backlog::add(int count, std::function<void(int)> work) {
  std::lock_guard<std::mutex> lock(mutex);
  tasks.push_back({std::move(work), 0, count, count});
  more.notify_all();
  return (int64_t)tasks.size() - 1;
}

bool Backlog::take(std::unique_lock<std::mutex>& lock) {
  while (first < tasks.size() && tasks[first].next == tasks[first].count) first++;
  if (first == tasks.size()) return false;
  Task& task = tasks[first];
  const int piece = task.next++;
  lock.unlock();
  task.work(piece);
  lock.lock();
  if (--task.undone == 0) less.notify_all();
  return true;
}

bool Backlog::wait(int64_t number, int milliseconds) {
  const auto until = std::chrono::steady_clock::now() + std::chrono::milliseconds(milliseconds);
  std::unique_lock<std::mutex> lock(mutex);
  while (tasks[number].undone > 0) {
    if (std::chrono::steady_clock::now() >= until) return false;
    if (!take(lock)) less.wait_until(lock, until);
  }
  return true;
}

extern "C" {
Backlog* cabochon_backlog(int threads) { return new Backlog(threads); }

int cabochon_wait(Backlog* backlog, int64_t number, int milliseconds) {
  return backlog->wait(number, milliseconds);
}

void cabochon_end(Backlog* backlog) { delete backlog; }
}
