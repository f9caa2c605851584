// The options of attention, listed once: schemas, dispatcher signatures and calls, autograd's saved
// values and Python's binding all follow the listing. A new option is a field of AttentionOptions
// (reformer.h), an entry here, a check in resolve(), and its use in the kernels.
#pragma once

#include <ATen/core/Tensor.h>

#include <optional>
#include <string>
#include <tuple>
#include <type_traits>

#include "reformer.h"

namespace reformer {

template <typename T, typename Struct>
struct Option {
  const char* name;
  T Struct::* member;
};
template <typename T, typename Struct>
Option(const char*, T Struct::*) -> Option<T, Struct>;

// chunked_attention's: lsh_attention finds the buckets itself, and passes them on.
struct ChunkedAttentionOptions : AttentionOptions {
  std::optional<at::Tensor> buckets;  // int32 [B, H, R, L]; none: all pairs of a window may attend
};

// In the order of the schemas.
inline constexpr auto kOptionsBeforeBuckets = std::make_tuple(
    Option{"chunk_size", &AttentionOptions::chunk_size},
    Option{"look_back", &AttentionOptions::look_back},
    Option{"look_ahead", &AttentionOptions::look_ahead},
    Option{"causal", &AttentionOptions::causal}, Option{"mask_self", &AttentionOptions::mask_self},
    Option{"wrap", &AttentionOptions::wrap}, Option{"scale", &AttentionOptions::scale},
    Option{"key_padding_mask", &AttentionOptions::key_padding_mask});
inline constexpr auto kOptionsAfterBuckets =
    std::make_tuple(Option{"correct_duplicates", &AttentionOptions::correct_duplicates},
                    Option{"dropout_p", &AttentionOptions::dropout_p},
                    Option{"dropout_seed", &AttentionOptions::dropout_seed},
                    Option{"own_values", &AttentionOptions::own_values},
                    Option{"value_mix", &AttentionOptions::value_mix});

template <typename Struct>
inline constexpr auto kOptions = std::tuple_cat(kOptionsBeforeBuckets, kOptionsAfterBuckets);
template <>
inline constexpr auto kOptions<ChunkedAttentionOptions> = std::tuple_cat(
    kOptionsBeforeBuckets, std::make_tuple(Option{"buckets", &ChunkedAttentionOptions::buckets}),
    kOptionsAfterBuckets);

// f(option) for each in turn.
template <typename Struct, typename F>
void for_each_option(const F& f) {
  std::apply([&](const auto&... option) { (f(option), ...); }, kOptions<Struct>);
}

template <typename T>
inline constexpr bool is_tensor_option = std::is_same_v<std::decay_t<T>, std::optional<at::Tensor>>;

// Calls an operator, whose last arguments are the options.
template <typename Operator, typename Struct, typename... Leading>
auto call_with_options(const Operator& op, const Struct& options, const Leading&... leading) {
  return std::apply(
      [&](const auto&... option) { return op.call(leading..., (options.*option.member)...); },
      kOptions<Struct>);
}

// How the dispatcher passes an option.
template <typename T>
using Argument = std::conditional_t<is_tensor_option<T>, const T&, T>;

template <auto* f, typename Function, typename Options>
struct SpreadOptions;

template <auto* f, typename Result, typename Struct, typename... Leading, typename... T,
          typename... Owner>
struct SpreadOptions<f, Result (*)(const Struct&, Leading...), std::tuple<Option<T, Owner>...>> {
  static Result call(Leading... leading, Argument<T>... values) {
    Struct options;
    std::apply([&](const auto&... option) { ((options.*option.member = values), ...); },
               kOptions<Struct>);
    return f(options, leading...);
  }
};

// Of a function f(options, leading...): g(leading..., every option), as the dispatcher registers
// it.
template <typename Struct, auto* f>
inline constexpr auto* spread_options =
    &SpreadOptions<f, decltype(f), std::remove_const_t<decltype(kOptions<Struct>)>>::call;

inline std::string schema_type(int64_t) { return "int"; }
inline std::string schema_type(double) { return "float"; }
inline std::string schema_type(bool) { return "bool"; }
inline std::string schema_type(const at::Tensor&) { return "Tensor"; }
template <typename T>
std::string schema_type(const std::optional<T>&) {
  return schema_type(T()) + "?";
}

inline std::string schema_default(int64_t x) { return std::to_string(x); }
inline std::string schema_default(double x) { return std::to_string(x); }
inline std::string schema_default(bool x) { return x ? "True" : "False"; }
template <typename T>
std::string schema_default(const std::optional<T>&) {
  return "None";
}

// "int chunk_size=64, int look_back=1, ...", the last arguments of a schema.
template <typename Struct>
std::string schema_of_options() {
  std::string schema;
  const Struct defaults;
  for_each_option<Struct>([&](const auto& option) {
    const auto& value = defaults.*option.member;
    schema += (schema.empty() ? "" : ", ") + schema_type(value) + " " + option.name + "=" +
              schema_default(value);
  });
  return schema;
}

}  // namespace reformer
