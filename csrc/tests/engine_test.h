// What the tests of the engine share: checks that are counted and say what failed.
#pragma once

#include <functional>
#include <string>

namespace swinq::testing {

extern int checked, failed;

void check(bool holds, const std::string& what);

// The text of the Error that `work` throws; "" if it throws none.
std::string refusal(const std::function<void()>& work);

// Whether `work` throws an Error that holds these words and a fix.
void check_refused(const std::string& what, const std::string& words,
                   const std::function<void()>& work);

// A model of codes as one of floats (engine_dequantized.cpp).
void test_dequantized();

// What the C ABI says to mistakes, and to everything where there is no GPU (engine_mistakes.cpp).
void test_mistakes();
void test_without_gpu();

}  // namespace swinq::testing
