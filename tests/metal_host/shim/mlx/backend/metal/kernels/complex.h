// In place of MLX's file, whose arithmetic no kernel here uses.
#pragma once
#include <metal_stdlib>
using namespace metal;
template <typename T>
struct complex_t {
  T real, imag;
  constexpr complex_t(T r = T(0), T i = T(0)) : real(r), imag(i) {}
};
using complex32_t = complex_t<half>;
using complex64_t = complex_t<float>;
