# Sets CMAKE_CUDA_COMPILER, unless it is given, to the first nvcc of: CUDACXX, CUDA_HOME, CUDA_PATH, PATH,
# /usr/local/cuda. To be included before the CUDA language is enabled.
if(NOT CMAKE_CUDA_COMPILER AND NOT DEFINED ENV{CUDACXX})
    find_program(SWINQ_NVCC nvcc HINTS ENV CUDA_HOME ENV CUDA_PATH PATH_SUFFIXES bin
                 PATHS /usr/local/cuda)
    if(NOT SWINQ_NVCC)
        message(FATAL_ERROR "no nvcc in CUDACXX, CUDA_HOME, CUDA_PATH, PATH or /usr/local/cuda\n"
                            "  fix: install the CUDA toolkit 12.5 or later (no GPU is needed) or name "
                            "its folder in CUDA_HOME")
    endif()
    set(CMAKE_CUDA_COMPILER "${SWINQ_NVCC}")
endif()
