// Threads that take pieces of work as they come to it.
//
// A barrier waits for every thread of a team, also for one that the system has put off, and then a
// busy machine multiplies by thousandths of its speed. Here nobody waits for a thread that has not
// begun: whoever asks works too, and ends when the pieces that were taken are done. A thread takes
// pieces that follow each other, whose memory it reads on and on; who has none left takes half of
// what another has before it.
#pragma once

// Calls work(context, i) for each i below `count`, on at most `threads` threads, the caller's among
// them. While another caller has them, the caller does everything itself.
void share_work(int count, int threads, void (*work)(void*, int), void* context);

namespace {

constexpr int FEW_ROWS = 8;  // of activations, that are too little work to be told apart
constexpr int PART = 4096;   // numbers of a row that are worth a thread

template <class Work> inline void in_parallel(int count, int threads, const Work& work) {
  share_work(count, threads, [](void* context, int i) { (*(const Work*)context)(i); }, (void*)&work);
}

// Calls work(i, from, to) for parts of every row `i` below `n` that has `width` numbers, or for a few
// whole rows at a time; parts begin at multiples of 32.
template <class Work> inline void each_part(int n, int width, int threads, const Work& work) {
  const int parts = (width + PART - 1) / PART, rows = parts > 1 ? 1 : PART / width;
  in_parallel((n + rows - 1) / rows * parts, threads, [&](int piece) {
    const int first = piece / parts * rows, from = piece % parts * PART;
    const int to = from + PART < width ? from + PART : width;
    for (int i = first; i < first + rows && i < n; i++) work(i, from, to);
  });
}

// The same for every whole row, a few at a time.
template <class Work> inline void each_row(int n, int threads, const Work& work) {
  in_parallel((n + FEW_ROWS - 1) / FEW_ROWS, threads, [&](int piece) {
    const int from = piece * FEW_ROWS, to = from + FEW_ROWS < n ? from + FEW_ROWS : n;
    for (int i = from; i < to; i++) work(i);
  });
}

}  // namespace
