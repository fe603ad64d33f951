// Draft verification on CUDA: the launches. One source for sm_80 and later.
//
// Two kernels where rows are summed in float: `reduce` reads each row once, cut into chunks, and leaves of a chunk its
// top, its sum and, for Gumbel noise and at temperature 0, its best id; `draw` follows the accept tests and draws from
// one row of each sequence. Integer sums (top-k, top-p, deterministic) come from `exact`, a block a row, in place of
// `reduce`, or, where best ids are wanted as well, before it. Nothing waits for the host and no order of blocks or
// alignment of rows shows in the result, so calls can be captured in a graph and sequences do not notice each other.
//
// Traffic: the target's rows, and the draft's where draft_lse does not stand for them, once from memory; the rows that
// are drawn from and what `exact` reads again from the cache.
#include "cuda.hpp"
#include "cuda_draw.cuh"
#include "cuda_exact.cuh"

namespace pyquiet {
namespace {

constexpr int kInvalidValue = 1;  // cudaErrorInvalidValue

template <class T, int N>
Rows<T> rows(const View<T, N>& view) {
  return {view.data, view.stride[0], N > 1 ? view.stride[1 % N] : 0};
}

int64_t chunks_of(int64_t V) { return (V + kChunk - 1) / kChunk; }

template <class E>
Verify<E> unpack(const DraftVerification<E>& from, float* workspace) {
  Verify<E> a{};
  a.target = rows(from.target);
  a.draft = rows(from.draft);
  a.draft_tokens = rows(from.draft_tokens);
  a.lengths = rows(from.lengths);
  a.draft_lse = rows(from.draft_lse);
  a.tokens = rows(from.tokens);
  a.count = rows(from.count);
  a.accepted = rows(from.accepted);
  a.fault = rows(from.fault);
  a.log_probs = rows(from.log_probs);
  a.bonus = rows(from.bonus);
  a.stream = from.stream;
  const float inverse[] = {from.processing.inverse, from.draft_inverse};
  for (int i = 0; i < 2; ++i) {
    a.greedy[i] = inverse[i] == 0;
    a.processing[i] = from.processing;
    a.processing[i].inverse = a.greedy[i] ? 1.0f : inverse[i];
  }
  const auto [B, T, V] = from.target.shape;
  a.k = from.draft_tokens.shape[1];
  a.slots = T + a.k;
  a.V = static_cast<int32_t>(V);
  a.chunks = static_cast<int32_t>(chunks_of(V));
  a.first_is_exact = from.first_is_exact;
  a.bonus_row = T > a.k;
  a.gumbel = from.gumbel && !a.greedy[0];
  a.rejection = !from.gumbel && !a.greedy[0];
  a.deterministic = from.deterministic && a.rejection;
  const bool filtered =
      !a.greedy[0] && ((from.processing.top_k > 0 && from.processing.top_k < V) || from.processing.top_p < 1);
  a.exact = filtered || a.deterministic;
  a.partial = !a.rejection || !a.exact;
  a.reads_draft = a.rejection && from.draft && (a.exact || a.greedy[1] || !from.draft_lse);
  a.partials = reinterpret_cast<Partial*>(workspace);
  a.exacts = reinterpret_cast<Exact*>(a.partials + B * a.slots * a.chunks);
  a.weights = a.exacts + B * a.slots;
  a.arrived = reinterpret_cast<uint32_t*>(static_cast<ChunkWeight<double>*>(a.weights) + B * a.chunks);
  return a;
}

template <class E>
int run(const Verify<E>& a, int64_t B, void* stream) {
  const int64_t rows = B * (a.reads_draft ? a.slots : a.slots - a.k);
  int error = 0;
  if (a.exact) error = launch(exact_kernel<E>, rows, kExactThreads, sizeof(ExactShared), stream, a);
  if (a.partial && error == 0)
    error = launch(reduce_kernel<E>, rows * a.chunks, kThreads, sizeof(ReduceShared<E>), stream, a);
  if (error) return error;
  if (a.deterministic)
    return launch(draw_kernel<E, uint64_t>, B * a.chunks, kThreads, sizeof(DrawShared<E, uint64_t>), stream, a);
  return launch(draw_kernel<E, double>, a.rejection ? B * a.chunks : B, kThreads, sizeof(DrawShared<E, double>), stream,
                a);
}

}  // namespace

int64_t verify_draft_workspace(int64_t B, int64_t k, int64_t rows, int64_t V) {
  static_assert(sizeof(ChunkWeight<double>) == sizeof(ChunkWeight<uint64_t>), "one space for both");
  const int64_t slots = rows + k, chunks = chunks_of(V);
  const int64_t sequence = slots * (chunks * sizeof(Partial) + sizeof(Exact)) + chunks * sizeof(ChunkWeight<double>);
  return B * (sequence + sizeof(uint32_t)) / sizeof(float);
}

template <class E>
int verify_draft_cuda(const DraftVerification<E>& a, float* workspace, void* stream) {
  if (a.target.shape[2] < 1 || a.target.shape[2] > 1 << 24) return kInvalidValue;
  return run(unpack(a, workspace), a.target.shape[0], stream);
}

template int verify_draft_cuda(const DraftVerification<float>&, float*, void*);
template int verify_draft_cuda(const DraftVerification<BFloat16>&, float*, void*);
template int verify_draft_cuda(const DraftVerification<Float16>&, float*, void*);

}  // namespace pyquiet
