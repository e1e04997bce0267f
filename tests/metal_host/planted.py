"""Planted bugs, by name: `test_mutants.py` shows that each of them is seen."""

from tests.metal_host.mutants import Mutant

_GROUP_SUM_BARRIER = (
    "  threadgroup_barrier(mem_flags::mem_threadgroup);\n"
    "  for (int r = 0; r < ROWS; ++r) {\n    v[r] = simd_sum("
)
_NO_BARRIER = _GROUP_SUM_BARRIER.split("\n", 1)[1]
_FIRST_LOAD = (
    "  if (live >= uint(N)) {\n    for (int i = 0; i < N; ++i) {\n"
    "      to[i] = static_cast<float>(from[i]);"
)
_VECTOR_LOAD = (
    "  if (live >= uint(N)) {\n    for (int i = 0; i < N; ++i) {\n"
    "      const vec<float, 4> x = *(const device vec<float, 4>*)(from);\n"
    "      to[i] = x[i];"
)

COMMON = "common.h"
MUTANTS = (
    # ---- synchronisation
    Mutant("group sum: barrier missing", COMMON, _GROUP_SUM_BARRIER, _NO_BARRIER,
           "normalize_rows"),
    Mutant("group sum: barrier orders no memory", COMMON, _GROUP_SUM_BARRIER,
           _GROUP_SUM_BARRIER.replace("mem_threadgroup", "mem_none"), "fused_weight"),
    Mutant("group sum: simd_sum in half the lanes", COMMON,
           "const float sum = simd_sum(v[r]);",
           "float sum = 0.0f;\n    if (lane < 16) {sum = simd_sum(v[r]);}",
           "normalize_rows"),
    Mutant("adapted_norm: no barrier before a tile is overwritten",
           "adapted_norm.metal",
           "      threadgroup_barrier(mem_flags::mem_threadgroup);  ", "      ",
           "adapted_norm"),
    Mutant("adapted_norm: no barrier after a tile is staged", "adapted_norm.metal",
           "      threadgroup_barrier(mem_flags::mem_threadgroup);\n"
           "      dora_add_product", "      dora_add_product", "adapted_norm"),
    Mutant("fused_weight: no barrier after B is staged", "fused_weight.metal",
           "  threadgroup_barrier(mem_flags::mem_threadgroup);\n  const uint steps",
           "  const uint steps", "fused_weight"),
    Mutant("dora_scale: no barrier after h is staged", "dora_scale.metal",
           "  threadgroup_barrier(mem_flags::mem_threadgroup);\n", "\n", "dora_scale"),
    Mutant("dora_scale_backward: barrier in divergent flow",
           "dora_scale_backward.metal",
           "  threadgroup_barrier(mem_flags::mem_threadgroup);\n",
           "  if (live > 0u) {\n    threadgroup_barrier(mem_flags::mem_threadgroup);\n"
           "  }\n", "dora_scale_backward"),
    Mutant("dora_scale: threads without a column return before the barrier",
           "dora_scale.metal", "  for (uint i = lid;",
           "  if (c >= out) return;\n  for (uint i = lid;", "dora_scale"),
    Mutant("normalize_rows: two threads write the norm", "normalize_rows.metal",
           "if (lid == 0)", "if (lid < 2)", "normalize_rows"),
    # ---- bounds
    Mutant("load: reads past the end and discards", COMMON,
           "to[i] = uint(i) < live ? static_cast<float>(from[i]) : 0.0f;",
           "const float x = static_cast<float>(from[i]);\n"
           "      to[i] = uint(i) < live ? x : 0.0f;", "normalize_rows"),
    Mutant("load: no tail", COMMON, "if (live >= uint(N)) {\n    for (int i = 0; "
           "i < N; ++i) {\n      to[i] = static_cast<float>",
           "if (live > 0u) {\n    for (int i = 0; i < N; ++i) {\n"
           "      to[i] = static_cast<float>", "dora_scale"),
    Mutant("store: writes past the end", COMMON, "      if (uint(i) < live) {",
           "      if (live > 0u) {", "fused_weight"),
    Mutant("store: last column missing", COMMON, "      if (uint(i) < live) {",
           "      if (uint(i) + 1 < live) {", "dora_scale"),
    Mutant("adapted_norm: writes rows that do not exist", "adapted_norm.metal",
           "lane == 0 && row < out", "lane == 0", "adapted_norm"),
    Mutant("adapted_norm: reads rows that do not exist", "adapted_norm.metal",
           "row < out ? dora_live(c, n) : 0u", "dora_live(c, n)", "adapted_norm"),
    Mutant("dora_scale_backward: tokens past the last", "dora_scale_backward.metal",
           "row < tokens ? live : 0u", "live", "dora_scale_backward"),
    Mutant("dora_scale_columns: no bound on the column", "dora_scale_columns.metal",
           "if (col < out)", "if (true)", "dora_scale_columns"),
    Mutant("normalize_rows: partial sums of half the simdgroups",
           "normalize_rows.metal", "part[8]", "part[4]", "normalize_rows"),
    Mutant("adapted_norm: tile of A one row of padding short", "adapted_norm.metal",
           "a_tile[K * (32 * N + 1)]", "a_tile[K * 32 * N]", "adapted_norm"),
    Mutant("stage B: rows outside left as they were", COMMON,
           "    tile[row * uint(K) + k] =\n        is_inside ? lora_b[size_t(k0 + k) * "
           "out + row0 + row] : 0.0f;",
           "    if (is_inside) {\n      tile[row * uint(K) + k] = "
           "lora_b[size_t(k0 + k) * out + row0 + row];\n    }", "adapted_norm"),
    # ---- values
    Mutant("group sum: stale partial sums", COMMON,
           "simd_sum(lane < nsg ? part[uint(r) * nsg + lane] : 0.0f)",
           "simd_sum(part[uint(r) * nsg + lane])", "normalize_rows"),
    Mutant("group sum: one simdgroup only", COMMON,
           "simd_sum(lane < nsg ? part[uint(r) * nsg + lane] : 0.0f)",
           "part[uint(r) * nsg]", "normalize_rows"),
    Mutant("group sum: last simdgroup forgotten", COMMON, "lane < nsg ?",
           "lane + 1 < nsg ?", "fused_weight"),
    Mutant("gain: no guard against a zero norm", COMMON,
           "return norm > 0.0f ? m / norm : 0.0f;", "return m / norm;",
           "normalize_rows"),
    Mutant("sum of squares in half precision", "normalize_rows.metal",
           "sum[0] = metal::fma(v[i], v[i], sum[0]);",
           "sum[0] = float(half(metal::fma(v[i], v[i], sum[0])));", "normalize_rows"),
    Mutant("product: wrong row length of A's tile", COMMON,
           "a_tile[uint(k * (32 * N + 1) + i * 32) + lane]",
           "a_tile[uint(k * (32 * N) + i * 32) + lane]", "adapted_norm"),
    Mutant("norm: no floor", COMMON, "metal::max(adapted, floor2)", "adapted",
           "adapted_norm"),
    Mutant("norm: floor with the scale unsquared", COMMON,
           "metal::fma(s * s, update, base)", "metal::fma(s, update, base)",
           "adapted_norm"),
    Mutant("unpack: codes in reverse order", COMMON, "stream >> (i * BITS)",
           "stream >> ((7 - i) * BITS)", "adapted_norm_packed"),
    Mutant("unpack: wrong width of the mask", COMMON, "uint((1 << BITS) - 1)",
           "uint((1 << 4) - 1)", "adapted_norm_packed"),
    Mutant("unpack: codes across a word border cut", COMMON,
           "((uint64_t(high) << 32) | uint64_t(low))", "uint64_t(low)",
           "adapted_norm_packed"),
    Mutant("packed: half the group size", "adapted_norm_packed.metal",
           "c / uint(GROUP)", "c / uint(GROUP / 2)", "adapted_norm_packed"),
    Mutant("packed: second half of the words not loaded", "adapted_norm_packed.metal",
           "is_second ? weight[line + word + 32] : 0u", "0u", "adapted_norm_packed"),
    Mutant("fused_weight: steps share registers", "fused_weight.metal",
           "t * uint(ROWS * N)", "t * uint(N)", "fused_weight"),
    Mutant("dora_scale: gain forgotten", "dora_scale.metal",
           "metal::fma(g[i], v[r * N + i], shift[i])", "v[r * N + i] + shift[i]",
           "dora_scale"),
    Mutant("dora_scale_backward: offset not subtracted", "dora_scale_backward.metal",
           "value[i] - shift[i]", "value[i]", "dora_scale_backward"),
    Mutant("dora_scale_columns: division by a zero gain",
           "dora_scale_columns.metal", "g != 0.0f ? total / g : 0.0f",
           "total / g", "dora_scale_columns"),
    # ---- what the checks of the language see
    Mutant("load: vector load of unaligned rows", COMMON, _FIRST_LOAD, _VECTOR_LOAD,
           "normalize_rows", r"float32-(3x33|4x1000)$"),
    Mutant("store: float to bfloat without a cast", COMMON,
           "      to[i] = static_cast<T>(from[i]);", "      to[i] = from[i];",
           "normalize_rows", r"bfloat16-9x31$", is_refused_by_the_compiler=True),
    Mutant("max of a float and an int", COMMON, "metal::max(adapted, floor2)",
           "metal::max(adapted, 0)", "adapted_norm", is_refused_by_the_compiler=True),
)  # fmt: skip

# Only the checks of Metal's own rules can see these: the C++ is valid.
LANGUAGE_MUTANTS = (
    Mutant("a double literal", COMMON, "m / norm : 0.0f", "m / norm : 0.0",
           "normalize_rows"),
    Mutant("a double variable", COMMON, "const float sum = simd_sum",
           "const double sum = simd_sum", "normalize_rows"),
    Mutant("a standard library call", COMMON, "metal::precise::sqrt(metal::max",
           "std::sqrt(metal::max", "adapted_norm"),
    Mutant("device pointer where MLX passes constant memory", COMMON,
           "METAL_FUNC void dora_load(P from,",
           "METAL_FUNC void dora_load(const device float* from,", "dora_scale",
           r"float32-1x1-r8$"),
    Mutant("pointer without an address space", COMMON,
           "thread float* v, threadgroup float* part,", "thread float* v, float* part,",
           "normalize_rows"),
    Mutant("thread pointer without an address space", COMMON,
           "uint live, thread float* to", "uint live, float* to", "normalize_rows"),
    Mutant("a vector of bytes read as floats across address spaces", COMMON,
           "const threadgroup float* b_tile, uint lane,",
           "const device float* b_tile, uint lane,", "adapted_norm"),
)  # fmt: skip
