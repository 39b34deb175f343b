// Exceptions of the C++ side; the bindings raise the classes of the same name in
// pyengine/errors.py. A message says what was wrong, where (tensor, field, value) and what to do.
#pragma once

#include <stdexcept>
#include <string>

namespace pyengine {

class PyEngineError : public std::runtime_error {
 public:
  using std::runtime_error::runtime_error;
};

// A checkpoint lacks a tensor, holds one of the wrong shape or dtype, or was changed while in use.
class CheckpointError : public PyEngineError {
 public:
  using PyEngineError::PyEngineError;
};

// A configuration value that no model or cache can have.
class ConfigError : public PyEngineError {
 public:
  using PyEngineError::PyEngineError;
};

// A batch or a sampling parameter that this model cannot serve.
class RequestError : public PyEngineError {
 public:
  using PyEngineError::PyEngineError;
};

// Blocks of the KV cache, or memory of the machine, ran out.
class OutOfMemory : public PyEngineError {
 public:
  using PyEngineError::PyEngineError;
};

// A fault of pyengine itself.
class InternalError : public PyEngineError {
 public:
  using PyEngineError::PyEngineError;
};

}  // namespace pyengine
