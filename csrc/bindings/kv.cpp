// BlockManager and KVCache.
#include "bindings/bindings.h"
#include "kv/block_manager.h"

namespace pyengine::bindings {

void bind_kv(py::module_& m) {
  using py::arg;
  py::class_<BlockManager>(m, "BlockManager")
      .def(py::init<int32_t, bool>(), arg("num_blocks"), arg("enable_prefix_caching") = true)
      .def_property_readonly("num_blocks", &BlockManager::num_blocks)
      .def_property_readonly("num_available", &BlockManager::num_available)
      .def_property_readonly("num_in_use", &BlockManager::num_in_use)
      .def(
          "match",
          [](BlockManager& self, py::handle token_ids) {
            Int32View tokens(token_ids, "token_ids");
            return self.match(tokens.begin(), tokens.size());
          },
          arg("token_ids"))
      .def("allocate", &BlockManager::allocate, arg("count"))
      .def("fork", &BlockManager::fork, arg("blocks"))
      .def("free", &BlockManager::free, arg("blocks"))
      .def("make_writable", &BlockManager::make_writable, arg("block"))
      .def(
          "publish",
          [](BlockManager& self, py::handle token_ids, const std::vector<int32_t>& blocks) {
            Int32View tokens(token_ids, "token_ids");
            self.publish(tokens.begin(), tokens.size(), blocks);
          },
          arg("token_ids"), arg("blocks"))
      .def("reference_count", &BlockManager::reference_count, arg("block"))
      .def("reset_prefix_cache", &BlockManager::reset_prefix_cache)
      .def("check_invariants", &BlockManager::check_invariants);

  auto layout = [](int32_t n_head, int32_t head_dim, const std::string& dtype) {
    return KVLayout{kv_dtype_from(dtype), n_head, head_dim};
  };
  py::class_<PyKVCache>(m, "KVCache")
      .def(py::init([layout](int32_t n_layer, int32_t n_head, int32_t head_dim, int32_t num_blocks,
                             const std::string& dtype) {
             return std::make_unique<PyKVCache>(n_layer, layout(n_head, head_dim, dtype),
                                                num_blocks);
           }),
           arg("n_layer"), arg("n_head"), arg("head_dim"), arg("num_blocks"), arg("dtype"))
      .def_property_readonly("num_blocks",
                             [](const PyKVCache& kv) { return kv.cache.num_blocks(); })
      .def_property_readonly("dtype",
                             [](const PyKVCache& kv) { return name_of(kv.cache.layout().dtype); })
      .def_property_readonly("block_bytes",
                             [](const PyKVCache& kv) { return kv.cache.block_bytes(); })
      .def_static(
          "bytes_per_block",
          [layout](int32_t n_layer, int32_t n_head, int32_t head_dim, const std::string& dtype) {
            return KVCache::bytes_per_block(n_layer, layout(n_head, head_dim, dtype));
          },
          arg("n_layer"), arg("n_head"), arg("head_dim"), arg("dtype"));
}

}  // namespace pyengine::bindings
