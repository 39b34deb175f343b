#include <algorithm>
#include <map>
#include <random>
#include <set>

#include "core/errors.h"
#include "kv/block_manager.h"
#include "kv/kv_cache.h"
#include "tests/check.h"

using pyengine::BlockManager;
using pyengine::kBlockTokens;

namespace {

using Tokens = std::vector<int32_t>;
using Blocks = std::vector<int32_t>;

Tokens counting(int32_t first, int n) {
  Tokens tokens(n);
  for (int i = 0; i < n; ++i) tokens[i] = first + i;
  return tokens;
}

Blocks match(BlockManager& m, const Tokens& tokens) {
  return m.match(tokens.data(), static_cast<int64_t>(tokens.size()));
}

void publish(BlockManager& m, const Tokens& tokens, const Blocks& blocks) {
  m.publish(tokens.data(), static_cast<int64_t>(tokens.size()), blocks);
}

}  // namespace

TEST(low_numbers_come_first) {
  BlockManager m(8, true);
  CHECK(m.allocate(3) == (Blocks{0, 1, 2}));
  m.free({1});
  CHECK(m.allocate(2) == (Blocks{1, 3}));
  m.check_invariants();
}

TEST(a_prompt_never_matches_whole) {
  BlockManager m(8, true);
  Tokens tokens = counting(0, 48);
  Blocks blocks = m.allocate(3);
  publish(m, tokens, blocks);
  m.free(blocks);
  CHECK_EQ(match(m, tokens).size(), size_t{2});
  tokens.push_back(48);
  CHECK_EQ(match(m, tokens).size(), size_t{3});
  tokens[20] = -1;
  CHECK_EQ(match(m, tokens).size(), size_t{1});
  CHECK_EQ(match(m, {}).size(), size_t{0});
}

TEST(tails_are_evicted_before_heads) {
  BlockManager m(4, true);
  Tokens tokens = counting(0, 65);
  Blocks blocks = m.allocate(4);
  publish(m, tokens, blocks);
  m.free(blocks);
  for (size_t left = 4; left > 0; --left) {
    Blocks hit = match(m, tokens);
    CHECK(hit == Blocks(blocks.begin(), blocks.begin() + left));
    m.free(hit);
    CHECK_EQ(m.allocate(1)[0], blocks[left - 1]);  // held from now on
    m.check_invariants();
  }
  CHECK(match(m, tokens).empty());
}

TEST(too_few_blocks_change_nothing) {
  BlockManager m(4, true);
  Blocks held = m.allocate(3);
  CHECK_THROWS(m.allocate(2), pyengine::OutOfMemory, "1 of 4");
  CHECK_EQ(m.num_available(), 1);
  CHECK_EQ(m.allocate(1).size(), size_t{1});
  CHECK_THROWS(m.make_writable((m.fork(held), held[0])), pyengine::OutOfMemory, "0 of 4");
  m.check_invariants();
}

TEST(shared_and_indexed_blocks_are_copied_before_writing) {
  BlockManager m(4, true);
  Blocks a = m.allocate(1);
  CHECK_EQ(m.make_writable(a[0]), a[0]);
  m.fork(a);
  int32_t copy = m.make_writable(a[0]);
  CHECK(copy != a[0]);
  CHECK_EQ(m.reference_count(a[0]), 1);
  publish(m, counting(0, 16), a);
  CHECK(m.make_writable(a[0]) != a[0]);
  CHECK_EQ(m.reference_count(a[0]), 0);
  CHECK_EQ(m.num_in_use(), 2);
  CHECK(match(m, counting(0, 17)) == a);  // the original is still to be found
  m.check_invariants();
}

TEST(a_recomputed_prefix_leads_to_its_old_continuation_again) {
  BlockManager m(4, true);
  Tokens tokens = counting(0, 33);
  Blocks first = m.allocate(2), second = m.allocate(2);
  publish(m, tokens, first);
  publish(m, tokens, second);  // duplicates: not indexed
  m.free(second);
  CHECK_EQ(m.num_available(), 2);
  m.reset_prefix_cache();
  CHECK(match(m, tokens).empty());
  publish(m, tokens, first);  // a running sequence publishes again when its next block is full
  CHECK(match(m, tokens) == first);
  m.check_invariants();
}

TEST(misuse_is_named) {
  BlockManager m(4, true);
  CHECK_THROWS(m.free({0}), pyengine::InternalError, "held by nobody");
  CHECK_THROWS(m.fork({0}), pyengine::InternalError, "held by nobody");
  CHECK_THROWS(m.free({4}), pyengine::InternalError, "block 4");
  CHECK_THROWS(m.reference_count(-1), pyengine::InternalError, "block -1");
  CHECK_THROWS(m.allocate(-1), pyengine::InternalError, "negative");
  CHECK_THROWS(publish(m, counting(0, 32), {0}), pyengine::InternalError, "2 blocks");
  CHECK_THROWS(BlockManager(0, true), pyengine::ConfigError, "num_blocks");
}

// Random operations of many sequences; what the manager says is compared with plain lists.
TEST(random_schedules_balance) {
  for (uint32_t seed = 0; seed < 30; ++seed) {
    std::mt19937 random(seed);
    auto below = [&](int n) { return static_cast<int>(random() % n); };
    const int num_blocks = 4 + below(20);
    BlockManager m(num_blocks, seed % 4 != 3);
    struct Sequence {
      Tokens tokens;
      Blocks blocks;
    };
    std::vector<Sequence> running;
    std::map<int32_t, Tokens> content;  // tokens up to the end of a block, when it was published
    for (int op = 0; op < 400; ++op) {
      int which = below(6);
      if (which <= 1) {  // a new sequence
        Sequence s;
        int length = 1 + below(80);
        for (int i = 0; i < length; ++i) s.tokens.push_back(below(2) * (i % 16 == 0));
        s.blocks = match(m, s.tokens);
        CHECK(static_cast<int>(s.blocks.size()) <= (length - 1) / kBlockTokens);
        for (size_t i = 0; i < s.blocks.size(); ++i) {
          Tokens prefix(s.tokens.begin(), s.tokens.begin() + (i + 1) * kBlockTokens);
          CHECK(content.at(s.blocks[i]) == prefix);
        }
        int more = (length + kBlockTokens - 1) / kBlockTokens - static_cast<int>(s.blocks.size());
        if (more > m.num_available()) {
          CHECK_THROWS(m.allocate(more), pyengine::OutOfMemory, "blocks");
          m.free(s.blocks);
        } else {
          for (int32_t block : m.allocate(more)) {
            content.erase(block);
            s.blocks.push_back(block);
          }
          running.push_back(s);
        }
      } else if (running.empty()) {
        continue;
      } else if (which == 2) {
        size_t i = below(static_cast<int>(running.size()));
        m.free(running[i].blocks);
        running.erase(running.begin() + i);
      } else if (which == 3) {
        const Sequence& s = running[below(static_cast<int>(running.size()))];
        publish(m, s.tokens, s.blocks);
        for (size_t i = 0; (i + 1) * kBlockTokens <= s.tokens.size(); ++i) {
          content[s.blocks[i]] =
              Tokens(s.tokens.begin(), s.tokens.begin() + (i + 1) * kBlockTokens);
        }
      } else if (which == 4) {
        Sequence s = running[below(static_cast<int>(running.size()))];
        m.fork(s.blocks);
        running.push_back(s);
      } else if (m.num_available() > 0) {
        Sequence& s = running[below(static_cast<int>(running.size()))];
        int32_t& block = s.blocks.back();
        bool shared = m.reference_count(block) > 1;
        int32_t before = block;
        block = m.make_writable(block);
        CHECK(!shared || block != before);
        content.erase(block);
        s.tokens.back() = 1000 + op;  // written: no longer what others may have published
      }
      m.check_invariants();
      std::map<int32_t, int32_t> references;
      for (const Sequence& s : running) {
        for (int32_t block : s.blocks) ++references[block];
      }
      for (int32_t block = 0; block < num_blocks; ++block) {
        auto held = references.find(block);
        CHECK_EQ(m.reference_count(block), held == references.end() ? 0 : held->second);
      }
      CHECK_EQ(m.num_in_use(), static_cast<int32_t>(references.size()));
    }
    for (const Sequence& s : running) m.free(s.blocks);
    CHECK_EQ(m.num_available(), num_blocks);
    m.reset_prefix_cache();
    m.check_invariants();
  }
}

TEST(cache_layers_lie_apart) {
  pyengine::KVLayout layout{pyengine::DType::bf16, 3, 5};
  pyengine::KVCache cache(2, layout, 7);
  CHECK_EQ(layout.block_bytes(), size_t{2 * 3 * 16 * (6 + 16)});
  CHECK_EQ(cache.block_bytes(), size_t{2 * 2 * 3 * 16 * (6 + 16)});
  const pyengine::KVLayout bytes{pyengine::DType::i8, 3, 5};  // a float scale per token and head
  CHECK_EQ(bytes.block_bytes(), size_t{3 * 16 * ((4 + 8) + (4 + 16))});
  const pyengine::KVLayout floats{pyengine::DType::f32, 3, 5};
  CHECK_EQ(floats.block_bytes(), size_t{4 * 3 * 16 * (5 + 16)});
  auto* first = static_cast<std::byte*>(cache.layer(0).data);
  auto* second = static_cast<std::byte*>(cache.layer(1).data);
  CHECK(second >= first + 7 * layout.block_bytes());
  second[7 * layout.block_bytes() - 1] = std::byte{1};
  CHECK_THROWS(pyengine::KVCache(2, layout, 0), pyengine::ConfigError, "num_blocks");
}
