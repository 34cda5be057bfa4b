// One GEMM with made-up operands, and what it should give: a plain product on the GPU, loops only.
#pragma once

#include "compare.h"
#include "kernels/gemm.h"

namespace swinq::testing {

enum class Data {
    kOrdinary,     // uniform codes or numbers, scales of many sizes, some channels dead
    kAccumulator,  // factor 1, bias 0: y is the sum itself
    kExtreme,      // int8: every code -128 (weights -127 and 127), the largest sums there are
    kHalfway,      // int8: small sums times 1/2, so that every second one is between two codes
};

class GemmProblem {
  public:
    // Room for any problem up to these sizes.
    GemmProblem(Type operand, int m, int n, int k);

    // Fills the operands and computes what is expected of `m` rows.
    void make(int m, int n, int k, Data data);

    // What is expected of the first `rows` rows after an activation; valid until the next call.
    Expected expected(Activation activation, int rows);

    // The arguments of gemm() for the first `rows` rows, into `out`.
    GemmArguments arguments(Activation activation, Output output, int rows, void* out,
                            bool rounded = false) const;

    int m() const { return m_; }
    int n() const { return n_; }
    int k() const { return k_; }
    Type operand() const { return operand_; }
    // The stream's type that goes with the operand.
    Type stream() const { return operand_ == Type::kFloat ? Type::kFloat : Type::kHalf; }
    const void* before() const { return before_.get(); }  // (m, n) of the stream, for kResidual
    const float* inverse() const { return inverse_.get(); }
    const float* scale() const { return scale_.get(); }

  private:
    Type operand_;
    int m_ = 0, n_ = 0, k_ = 0;
    DeviceArray<uint8_t> a_, w_, laid_out_;  // (m, k), (n, k), (n padded to 32, k)
    DeviceArray<int> order_;                 // (32): which row of a group lies at each place
    DeviceArray<float> factor_, bias_, inverse_, scale_;  // (n)
    DeviceArray<uint8_t> before_;                         // (m, n)
    DeviceArray<int> sums_;                               // (m, n), int8 operands
    DeviceArray<double> exact_, exact_activated_;         // (m, n)
    DeviceArray<float> plain_, plain_activated_;          // (m, n)
};

// Order of the rows in a group of 32 of laid out weights: place -> row. Empty if the layout is
// anything but such an order with zero rows behind the last.
std::vector<int> layout_order(Type type);

// Bytes of an output of `rows` x `columns`.
int64_t output_bytes(const GemmArguments& arguments);
// Type of the output of such arguments.
Type output_type(const GemmArguments& arguments);

// Runs a problem on one tile (null: the default) and tallies it under the bound.
void run_gemm(Group& group, const std::string& label, GemmProblem& problem, Activation activation,
              Output output, bool rounded, int rows, const GemmTile* tile, const Bound& bound,
              GuardedBuffer& out, bool optional = false);

std::vector<GemmTile> tiles_for(const GemmArguments& arguments);
std::string describe(const GemmProblem& problem, int rows, const GemmTile* tile);

}  // namespace swinq::testing
