// swin_example: a Swin Transformer in FP32 or FP16, checked and timed.
#include "command_line.h"
#include "example.h"

namespace {

constexpr char kUsage[] =
    "usage: swin_example <version> <data_type> <model_type> <window> <img> <batch>\n"
    "                    [--checkpoint FILE]\n"
    "  version     1 or 2\n"
    "  data_type   0 FP32, 1 FP16\n"
    "  model_type  0 tiny, 1 small, 2 base, 3 large\n"
    "  window      side of a window in tokens: 7 or 12 (v1), 8, 16 or 24 (v2)\n"
    "  img         side of an image in pixels: 224 or 384 (v1), 256 or 384 (v2)\n"
    "  batch       number of images\n"
    "  --checkpoint FILE  an exported checkpoint instead of made-up weights, all of its layers\n"
    "                     fp16: data_type 1\n";

}  // namespace

int main(int argc, char** argv) {
    using namespace swinq::programs;
    return run_main(kUsage, [&] {
        Example example = {};
        const std::vector<int> n = parse(argc, argv,
                                         {{"version", 1, 2},
                                          {"data_type", 0, 1},
                                          {"model_type", 0, 3},
                                          {"window", 1, 1024},
                                          {"img", 1, 1 << 14},
                                          {"batch", 1, 1 << 16}},
                                         &example.checkpoint);
        example.version = n[0];
        example.numbers = n[1] == 0 ? Numbers::kFloat : Numbers::kHalf;
        example.size = static_cast<Size>(n[2]);
        example.window = n[3], example.img_size = n[4], example.batch = n[5];
        return run_example(example);
    });
}
