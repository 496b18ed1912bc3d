// SPDX-License-Identifier: GPL-2.0-only
#include "gpu-tracker/base/json.h"

#include <gtest/gtest.h>

#include <climits>

namespace phos {
namespace {

std::string quoted(std::string_view text) {
  return JsonWriter(0).value(text).str();
}

TEST(Json, NestingAndCommas) {
  JsonWriter json(0);
  json.begin_object().key("a").begin_array().value(1).value("x").begin_object().end_object();
  json.end_array().member("b", true).key("c").null().end_object();
  EXPECT_EQ(json.str(), R"({"a":[1,"x",{}],"b":true,"c":null})");
}

TEST(Json, Indentation) {
  JsonWriter json;
  json.begin_object().key("a").begin_array().value(1).value(2).end_array();
  json.key("b").begin_array().end_array().end_object();
  EXPECT_EQ(json.str(), "{\n  \"a\": [\n    1,\n    2\n  ],\n  \"b\": []\n}");
}

TEST(Json, Numbers) {
  JsonWriter json(0);
  json.begin_array().value(UINT64_MAX).value(INT64_MIN).value(false).value(uint8_t{7}).end_array();
  EXPECT_EQ(json.str(), "[18446744073709551615,-9223372036854775808,false,7]");
}

TEST(Json, Escapes) {
  EXPECT_EQ(quoted("\"\\/\n\t"), R"("\"\\/\n\t")");
  EXPECT_EQ(quoted(std::string_view("\0\x01\x1b\x7f", 4)), R"("\u0000\u0001\u001b\u007f")");
  JsonWriter json(0);
  json.begin_object().member("ke\"y", "").end_object();
  EXPECT_EQ(json.str(), R"({"ke\"y":""})");
}

TEST(Json, Utf8IsKeptAndEverythingElseReplaced) {
  const std::string bad = "\xef\xbf\xbd";
  auto quote = [](const std::string& s) { return "\"" + s + "\""; };
  for (const char* good : {"\xc3\xa9", "\xe2\x82\xac", "\xf0\x9f\x98\x80", "\xf4\x8f\xbf\xbf",
                           "\xed\x9f\xbf", "\xee\x80\x80"}) {
    EXPECT_EQ(quoted(good), quote(good));
  }
  EXPECT_EQ(quoted("a\xff"
                   "b"),
            quote("a" + bad + "b"));
  EXPECT_EQ(quoted("\xc3"), quote(bad));                                // cut short
  EXPECT_EQ(quoted("\xc0\xaf"), quote(bad + bad));                      // overlong
  EXPECT_EQ(quoted("\xed\xa0\x80"), quote(bad + bad + bad));            // surrogate
  EXPECT_EQ(quoted("\xf4\x90\x80\x80"), quote(bad + bad + bad + bad));  // above U+10FFFF
  EXPECT_EQ(quoted("\x80x"), quote(bad + "x"));
}

}  // namespace
}  // namespace phos
