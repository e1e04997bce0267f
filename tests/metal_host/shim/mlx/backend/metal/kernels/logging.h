// In place of MLX's file: the kernels do not log.
#pragma once
namespace mlx {
struct os_log {
  constexpr os_log(const char*, const char*) {}
  template <class... A>
  void log_debug(const char*, A...) const {}
};
}  // namespace mlx
