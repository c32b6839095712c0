# Looks for the headers that type the tables of csrc/nccl/. Nothing is linked, so a build has the
# GPU plane wherever they are: in a CUDA toolkit, or in the wheels that PyTorch for CUDA brings.
# Sets PYCOMM_HAS_GPU_HEADERS and PYCOMM_GPU_INCLUDES, or `gpu_lacks` to what is missing.

function(pycomm_find_gpu_headers)
  # The newest toolkit first; the wheels are namespace packages, in one or several folders.
  file(GLOB toolkits /usr/local/cuda /usr/local/cuda-*)
  list(SORT toolkits COMPARE NATURAL ORDER DESCENDING)
  find_package(Python COMPONENTS Interpreter QUIET)
  set(wheels "")
  if(Python_EXECUTABLE)
    execute_process(
      COMMAND ${Python_EXECUTABLE} -c "import nvidia; print(*nvidia.__path__, sep=';')"
      OUTPUT_VARIABLE wheels OUTPUT_STRIP_TRAILING_WHITESPACE ERROR_QUIET)
  endif()
  set(wheel_includes "")
  foreach(wheel ${wheels})
    list(APPEND wheel_includes ${wheel}/cu13/include ${wheel}/cuda_runtime/include
      ${wheel}/nccl/include)
  endforeach()
  list(TRANSFORM toolkits APPEND /include)

  find_path(cuda_include cuda_runtime_api.h NO_CACHE
    HINTS $ENV{CUDA_HOME}/include $ENV{CUDA_PATH}/include PATHS ${toolkits} ${wheel_includes})
  find_path(nccl_include nccl.h NO_CACHE
    HINTS $ENV{NCCL_HOME}/include PATHS ${wheel_includes} ${toolkits})
  if(NOT cuda_include)
    set(gpu_lacks "no cuda_runtime_api.h was found" PARENT_SCOPE)
    return()
  elseif(NOT nccl_include)
    set(gpu_lacks "no nccl.h was found" PARENT_SCOPE)
    return()
  endif()

  # Whether they are whole, fit together and are new enough is best asked by using them.
  set(includes ${cuda_include} ${nccl_include})
  if(NOT PYCOMM_GPU_HEADERS_PROBED STREQUAL "${includes}")
    set(probe ${CMAKE_CURRENT_BINARY_DIR}/gpu_headers.cpp)
    file(WRITE ${probe} "#include \"nccl/cuda_table.h\"\n#include \"nccl/nccl_table.h\"\n")
    execute_process(
      COMMAND ${CMAKE_CXX_COMPILER} -std=c++20 -fsyntax-only -I ${CMAKE_CURRENT_SOURCE_DIR}/csrc
              -isystem ${cuda_include} -isystem ${nccl_include} ${probe}
      RESULT_VARIABLE failed ERROR_VARIABLE output)
    if(failed)
      string(REGEX MATCH "[^\n]*error:[^\n]*" output "${output}")
      string(REPLACE "\"" "'" output "${output}")
      set(gpu_lacks "the headers in ${cuda_include} and ${nccl_include} do not do: ${output}"
        PARENT_SCOPE)
      return()
    endif()
    set(PYCOMM_GPU_HEADERS_PROBED "${includes}" CACHE INTERNAL "headers that compiled the probe")
  endif()
  set(PYCOMM_GPU_INCLUDES ${includes} PARENT_SCOPE)
endfunction()

set(gpu_lacks "")
set(PYCOMM_GPU_INCLUDES "")
if(PYCOMM_BUILD_CUDA STREQUAL "OFF")
  set(gpu_lacks "PYCOMM_BUILD_CUDA is OFF")
else()
  pycomm_find_gpu_headers()
endif()

if(gpu_lacks)
  set(PYCOMM_HAS_GPU_HEADERS OFF)
  set(remedy "Install nvidia-nccl-cu13, nvidia-cuda-runtime and nvidia-cuda-crt")
  if(PYCOMM_BUILD_CUDA STREQUAL "ON")
    message(FATAL_ERROR "pycomm: PYCOMM_BUILD_CUDA is ON, but ${gpu_lacks}\n  ${remedy}.")
  endif()
  message(STATUS "pycomm: the GPU plane is not built, ${gpu_lacks}. ${remedy} for GPUs.")
else()
  set(PYCOMM_HAS_GPU_HEADERS ON)
  message(STATUS "pycomm: building the GPU plane with the headers in ${PYCOMM_GPU_INCLUDES}")
endif()
