// Candidates for importance resampling on CUDA: the launches. One source for sm_80 and later.
//
// `sum_kernel` reads each row once, cut into chunks, and leaves of a chunk its top and the sums of its segments; then
// in `lookup_kernel` a warp draws one candidate, for which it reads these sums and one segment of the row. top-k, top-p
// and `deterministic` have `threshold_kernel`, a block a row, go before. Nothing waits for the host and no order of
// blocks or alignment of rows shows in the result, so calls can be captured in a graph and rows do not notice each
// other.
//
// Traffic: the rows once from memory, and once more where there is a threshold; a candidate, 512 ids from the cache.
#include "cuda.hpp"
#include "cuda_lookup.cuh"

namespace pyquiet {
namespace {

constexpr int kInvalidValue = 1;  // cudaErrorInvalidValue

int64_t chunks_of(int64_t V) { return (V + kChunk - 1) / kChunk; }

template <class E>
RowDraws<E> unpack(const CandidateDraw<E>& from, float* workspace) {
  RowDraws<E> a{};
  const auto [R, V] = from.logits.shape;
  const Processing& p = from.processing;
  a.logits = from.logits.data;
  a.stride = from.logits.stride[0];
  a.stream = from.stream;
  a.greedy = p.inverse == 0;
  const bool filtered = !a.greedy && ((p.top_k > 0 && p.top_k < V) || p.top_p < 1);
  a.base = {p.banned, 1.0f, 0, 1.0};
  a.law = {nullptr, a.greedy ? 1.0f : p.inverse, p.top_k, p.top_p};
  a.known = filtered || (from.deterministic && !a.greedy);
  a.plain = a.law.inverse == 1.0f && !a.known;
  a.V = static_cast<int32_t>(V);
  a.chunks = static_cast<int32_t>(chunks_of(V));
  a.rows = R;
  a.k = from.tokens.shape[1];
  a.tokens = from.tokens.data;
  a.fault = from.fault.data;
  a.log_probs = from.log_probs.data;
  a.log_base = from.log_base.data;
  a.lse = from.lse.data;
  a.token_stride = from.tokens.stride[0];
  a.prob_stride = from.log_probs.stride[0];
  a.base_stride = from.log_base.stride[0];
  a.fault_stride = from.fault.stride[0];
  a.lse_stride = from.lse.stride[0];
  a.sums = workspace;
  a.knowns = reinterpret_cast<Known*>(static_cast<ChunkSums<double>*>(a.sums) + R * a.chunks);
  return a;
}

template <class W, class E>
int run(const RowDraws<E>& a, void* stream) {
  int error = 0;
  if (a.known) error = launch(threshold_kernel<E>, a.rows, kExactThreads, sizeof(ExactShared), stream, a);
  if (error == 0) error = launch(sum_kernel<E, W>, a.rows * a.chunks, kThreads, sizeof(SumShared<E, W>), stream, a);
  if (error == 0) error = launch(lookup_kernel<E, W>, (a.rows * a.k + kWarps - 1) / kWarps, kThreads, 0, stream, a);
  return error;
}

}  // namespace

int64_t draw_candidates_workspace(int64_t R, int64_t V) {
  static_assert(sizeof(ChunkSums<double>) == sizeof(ChunkSums<uint64_t>), "one space for both");
  const int64_t row = chunks_of(V) * sizeof(ChunkSums<double>) + sizeof(Known);
  return R * row / sizeof(float);
}

template <class E>
int draw_candidates_cuda(const CandidateDraw<E>& a, float* workspace, void* stream) {
  const int64_t V = a.logits.shape[1];
  if (V < 1 || V > 1 << 24 || a.gumbel || a.law_lse) return kInvalidValue;
  const RowDraws<E> draws = unpack(a, workspace);
  return a.deterministic && !draws.greedy ? run<uint64_t>(draws, stream) : run<double>(draws, stream);
}

template int draw_candidates_cuda(const CandidateDraw<float>&, float*, void*);
template int draw_candidates_cuda(const CandidateDraw<BFloat16>&, float*, void*);
template int draw_candidates_cuda(const CandidateDraw<Float16>&, float*, void*);

}  // namespace pyquiet
