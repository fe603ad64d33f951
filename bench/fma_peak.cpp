// Ceilings of this machine: fp32 multiply-adds a second and bytes read a second.
//
//   fma_peak THREADS MEGABYTES   prints   GFLOP/s  GB/s
//
// VECTOR_BYTES (64, 32 or 16) is the register width of the ISA that is compiled for; an ISA without
// fused multiply-add is measured with a multiply and an add. 12 accumulators cover two units of
// latency 4 to 6 and still leave room for both operands among 16 registers.

#include <omp.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <vector>

typedef float Vector __attribute__((vector_size(VECTOR_BYTES)));
constexpr int lanes = VECTOR_BYTES / sizeof(float);
constexpr int accumulators = 12;

static volatile float factor_source = 0.999f, addend_source = 0.001f, sink;

static void spin(long steps) {
  Vector factor = Vector{} + factor_source, addend = Vector{} + addend_source;
  Vector sum[accumulators];
  for (int a = 0; a < accumulators; ++a) sum[a] = addend * float(a);  // unequal: none folds away
  for (long step = 0; step < steps; ++step) {
#pragma GCC unroll 12
    for (int a = 0; a < accumulators; ++a) sum[a] = sum[a] * factor + addend;
  }
  float total = 0;
  for (const Vector& one : sum) total += one[0];
  sink = total;
}

static double fma_gflops(int threads) {
  constexpr long steps = 400000;
  double best = 1e30;
  for (int trial = 0; trial < 40; ++trial) {
    double begin = omp_get_wtime();
#pragma omp parallel num_threads(threads)
    spin(steps);
    best = std::min(best, omp_get_wtime() - begin);
  }
  return 2.0 * threads * steps * accumulators * lanes / best * 1e-9;
}

static double read_gbs(int threads, size_t megabytes) {
  const size_t vectors = (megabytes << 20) / sizeof(Vector);
  std::vector<Vector> data(vectors, Vector{} + 1.0f);
  double best = 1e30;
  for (int trial = 0; trial < 10; ++trial) {
    double begin = omp_get_wtime();
    float total = 0;
#pragma omp parallel num_threads(threads) reduction(+ : total)
    {
      Vector sum[4] = {};
#pragma omp for schedule(static)
      for (size_t i = 0; i < vectors / 4; ++i)
        for (int k = 0; k < 4; ++k) sum[k] += data[4 * i + k];
      total += (sum[0] + sum[1] + sum[2] + sum[3])[0];
    }
    sink = total;
    best = std::min(best, omp_get_wtime() - begin);
  }
  return vectors * sizeof(Vector) / best * 1e-9;
}

int main(int argc, char** argv) {
  if (argc != 3) return 2;
  const int threads = std::atoi(argv[1]);
  const double gflops = fma_gflops(threads);
  std::printf("%.1f %.1f\n", gflops, read_gbs(threads, std::atol(argv[2])));
}
