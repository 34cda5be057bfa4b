// What swin_example and swin_int8_example share: make a plan, check what it computes, time it.
#pragma once

#include <string>

#include "made_up_model.h"

namespace swinq::programs {

struct Example {
    int version;
    Numbers numbers;
    Size size;
    int window, img_size, batch;
    std::string checkpoint;  // "": made-up weights
};

// Prints what it checked and the times. Throws where the output is wrong, or anything else goes
// wrong.
int run_example(const Example& example);

}  // namespace swinq::programs
