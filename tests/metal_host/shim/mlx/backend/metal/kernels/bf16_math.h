// In place of MLX's file: the shim's metal_stdlib has the overloads for bfloat.
#pragma once
