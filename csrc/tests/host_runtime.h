// What the host's loops need of its runtime: see host_kernels.cpp.
#pragma once

#include <functional>

namespace swinq::testing {

// Does the work now, or whenever the graph is launched that this thread captures; never while
// kernels are only loaded.
void enqueue(std::function<void()> work);

}  // namespace swinq::testing
