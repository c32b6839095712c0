# Builds libpycomm_cuda.so, the image of the CUDA kernels (csrc/kernels/cuda/kernels.h), where a
# CUDA compiler is at hand. Neither nvcc nor any part of CUDA is needed for anything else, at build
# or at run time: the core opens the library when it first meets a CUDA tensor.
#
# nvcc makes device code only, which image.cpp includes as bytes. So CMake's own CUDA language stays
# off: it would compile and link host code with nvcc, against a CUDA runtime.
#
# What became of it is one line in cuda_kernels.txt beside the core.

# A processor of a later minor version runs the machine code of an earlier one of its major version
# (8.9 that of 8.0); what is newer than all of them, the driver compiles the PTX for.
set(cuda_architectures 80 90 100)
list(TRANSFORM cuda_architectures REPLACE "(.+)" "arch=compute_\\1,code=sm_\\1"
  OUTPUT_VARIABLE cuda_targets)
list(APPEND cuda_targets arch=compute_100,code=compute_100)
list(TRANSFORM cuda_targets PREPEND --generate-code=)
# -fmad=false: a fused multiply-add rounds once where the host's fold rounds twice.
set(nvcc_flags -fatbin -std=c++20 -O3 -fmad=false --expt-relaxed-constexpr --threads=2
  -ccbin ${CMAKE_CXX_COMPILER} ${cuda_targets})

# Sets `nvcc` and `nvcc_version`, or `cuda_lacks` to what is missing.
function(pycomm_find_nvcc)
  # As CMake itself would: a variable, the environment, PATH; then where CUDA is usually installed,
  # the wheels (nvidia-cuda-nvcc) last.
  if(CMAKE_CUDA_COMPILER)
    set(nvcc ${CMAKE_CUDA_COMPILER})
  elseif(DEFINED ENV{CUDACXX})
    set(nvcc $ENV{CUDACXX})
  else()
    find_program(nvcc NAMES nvcc NO_CACHE
      PATHS $ENV{CUDA_HOME}/bin $ENV{CUDA_PATH}/bin /usr/local/cuda/bin
            ${Python_SITEARCH}/nvidia/cu13/bin)
  endif()
  if(NOT nvcc)
    set(cuda_lacks "no nvcc was found" PARENT_SCOPE)
    return()
  endif()

  # Whether it compiles for these processors, with this C++ compiler, is best asked by doing it.
  set(probe ${CMAKE_CURRENT_BINARY_DIR}/cuda/probe.cu)
  if(NOT PYCOMM_NVCC_PROBED STREQUAL "${nvcc} ${nvcc_flags}")
    file(WRITE ${probe} "#include <span>\n__global__ void probe() {}\n")
    execute_process(COMMAND ${nvcc} ${nvcc_flags} -o ${probe}.fatbin ${probe}
      RESULT_VARIABLE failed OUTPUT_VARIABLE output ERROR_VARIABLE output)
    if(failed)
      set(cuda_lacks "${nvcc} cannot compile the kernels: ${output}" PARENT_SCOPE)
      return()
    endif()
    set(PYCOMM_NVCC_PROBED "${nvcc} ${nvcc_flags}" CACHE INTERNAL "nvcc that compiled the probe")
  endif()
  execute_process(COMMAND ${nvcc} --version OUTPUT_VARIABLE version)
  string(REGEX MATCH "V([0-9.]+)" _ "${version}")
  set(nvcc_version ${CMAKE_MATCH_1} PARENT_SCOPE)
  set(nvcc ${nvcc} PARENT_SCOPE)
endfunction()

set(cuda_lacks "")
if(PYCOMM_BUILD_CUDA STREQUAL "OFF")
  set(cuda_lacks "PYCOMM_BUILD_CUDA is OFF")
else()
  pycomm_find_nvcc()
endif()

if(NOT cuda_lacks)
  list(TRANSFORM cuda_architectures PREPEND sm_ OUTPUT_VARIABLE cuda_built_for)
  list(JOIN cuda_built_for ", " cuda_built_for)
  set(cuda_built_by "nvcc ${nvcc_version} for ${cuda_built_for}, compute_100")
  set(cuda_status "built by ${cuda_built_by}")
  message(STATUS "pycomm: building the CUDA kernels with ${nvcc}, ${cuda_built_by}")

  set(fatbin ${CMAKE_CURRENT_BINARY_DIR}/cuda/kernels.fatbin)
  set(kernels ${CMAKE_CURRENT_SOURCE_DIR}/csrc/kernels/cuda/kernels.cu)
  add_custom_command(
    OUTPUT ${fatbin}
    COMMAND ${CMAKE_COMMAND} -E make_directory ${CMAKE_CURRENT_BINARY_DIR}/cuda
    COMMAND ${nvcc} ${nvcc_flags} -I ${CMAKE_CURRENT_SOURCE_DIR}/csrc
            -MD -MT ${fatbin} -MF ${fatbin}.d -o ${fatbin} ${kernels}
    MAIN_DEPENDENCY ${kernels} DEPFILE ${fatbin}.d VERBATIM
    COMMENT "Compiling the CUDA kernels for ${cuda_built_for}")

  set(image ${CMAKE_CURRENT_SOURCE_DIR}/csrc/kernels/cuda/image.cpp)
  add_library(pycomm_cuda SHARED ${image} ${fatbin})
  target_include_directories(pycomm_cuda PRIVATE csrc)
  set_source_files_properties(${image} PROPERTIES
    OBJECT_DEPENDS ${fatbin}
    COMPILE_DEFINITIONS "PYCOMM_CUDA_FATBIN=\"${fatbin}\";PYCOMM_CUDA_BUILT_BY=\"${cuda_built_by}\"")
  install(TARGETS pycomm_cuda LIBRARY DESTINATION pycomm)
else()
  set(cuda_status "not built: ${cuda_lacks}")
  set(remedy "Put nvcc 12.8 or newer on PATH, or name it in CUDACXX, and build again")
  if(PYCOMM_BUILD_CUDA STREQUAL "ON")
    message(FATAL_ERROR "pycomm: PYCOMM_BUILD_CUDA is ON, but ${cuda_lacks}\n  ${remedy}.")
  endif()
  message(STATUS "pycomm: the CUDA kernels are not built, ${cuda_lacks}. ${remedy} for GPUs.")
endif()

string(REGEX REPLACE "[\r\n]+" " | " cuda_status "${cuda_status}")
file(GENERATE OUTPUT ${CMAKE_CURRENT_BINARY_DIR}/cuda_kernels.txt CONTENT "${cuda_status}\n")
install(FILES ${CMAKE_CURRENT_BINARY_DIR}/cuda_kernels.txt DESTINATION pycomm)
