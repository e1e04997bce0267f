// In place of checker.cpp where accesses are not instrumented.
#include <cstdio>

#include "executor.h"

namespace host {
void checker_start() {}
void checker_new_variable(const Variable&) {}
void checker_finish(bool) {}
void write_traffic(FILE*) {}
}  // namespace host
