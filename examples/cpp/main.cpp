// LSH attention from C++: every vector in the second half of a sequence is a noisy copy of one in
// the first half. Hashing brings the two together among thousands, so that each position attends to
// its twin; gradients then teach the values what to carry.
#include <reformer.h>
#include <torch/torch.h>

#include <cstdio>
#include <numeric>

int main() {
  torch::manual_seed(0);
  const int64_t heads = 2, length = 4096, head_dim = 64, rounds = 8;

  const auto half = torch::randn({1, heads, length / 2, head_dim});
  const auto qk = torch::cat({half, half + 0.1 * torch::randn_like(half)}, 2);
  auto v = torch::randn_like(qk).requires_grad_();

  reformer::AttentionOptions options;
  options.scale = 4.0;  // sharp: the best match takes nearly all of the softmax
  const auto n_buckets = reformer::default_n_buckets(length, options.chunk_size);
  const int64_t columns = std::accumulate(n_buckets.begin(), n_buckets.end(), int64_t{0}) / 2;
  const auto rotations = torch::randn({heads, head_dim, rounds, columns});
  const auto attend = [&] {
    return std::get<0>(reformer::lsh_attention(qk, v, rotations, n_buckets, options));
  };

  const auto twin = v.detach().roll(length / 2, 2);
  const auto found = ((attend() - twin).abs().amax(-1) < 0.1).to(torch::kDouble).mean();
  std::printf("lsh_attention: %lld positions, %lld rounds; %.2f%% found their twin\n",
              static_cast<long long>(length), static_cast<long long>(rounds),
              100 * found.item<double>());

  const auto target = torch::randn_like(v);
  double first = 0, last = 0;
  for (int step = 0; step < 5; ++step) {
    v.mutable_grad() = torch::Tensor();
    const auto loss = torch::mse_loss(attend(), target, at::Reduction::Sum) / 2;
    loss.backward();
    torch::NoGradGuard no_grad;
    v.sub_(v.grad(), 0.5);
    last = loss.item<double>() / target.numel();
    if (step == 0) first = last;
    std::printf("step %d: loss %.4f\n", step, last);
  }
  const bool ok = found.item<double>() > 0.99 && last < 0.1 * first;
  std::printf(ok ? "ok\n" : "FAILED: too few twins found, or the loss did not fall\n");
  return ok ? 0 : 1;
}
