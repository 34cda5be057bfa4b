// Faults on purpose, one for each tool of compute-sanitizer: a tool that misses its fault checks
// nothing.
#pragma once

#include <string>

namespace swinq::testing {

// Launches the kernel with the fault `out-of-bounds` (memcheck), `race` (racecheck), `sync`
// (synccheck) or `uninitialised` (initcheck). Returns false for another name.
bool run_plant(const std::string& fault);

}  // namespace swinq::testing
