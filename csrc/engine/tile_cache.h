// Tiles that were measured to be fastest, in one text file for each GPU's name and build of the
// library. Found by what is computed, so models share them. A file that is damaged, or of something
// else, is as good as none.
#pragma once

#include <map>
#include <string>

#include "kernels/gemm.h"

namespace swinq {

// What a GEMM computes, as far as its speed depends on it.
struct TileKey {
    int operand, activation, output, m, n, k;

    bool operator<(const TileKey& other) const;
    bool operator==(const TileKey& other) const { return !(*this < other) && !(other < *this); }
};

using Tiles = std::map<TileKey, GemmTile>;

TileKey tile_key(const GemmArguments& arguments);

// Whether there is such a tile for these arguments on the current device.
bool exists(const GemmTile& tile, const GemmArguments& arguments);

// Where the tiles of such a GPU are kept; "" if the environment names no folder.
std::string tile_cache_path(const std::string& gpu);

// The file's tiles; none if there is no file, or it is not wholly what add_tiles() wrote for this
// GPU.
Tiles read_tiles(const std::string& path, const std::string& gpu);

// Adds tiles to the file, in place of others for the same GEMMs; makes its folder if need be. The
// file is replaced in one step, and no other process adds meanwhile.
void add_tiles(const std::string& path, const std::string& gpu, const Tiles& tiles);

// The text of the file, and what a text says; none of it if anything is amiss.
std::string format_tiles(const std::string& gpu, const Tiles& tiles);
Tiles parse_tiles(const std::string& content, const std::string& gpu);

}  // namespace swinq
