// SPDX-License-Identifier: GPL-2.0-only
#include "test/image/wire.h"

#include <algorithm>
#include <optional>

#include "gpu-tracker/image/file.h"

namespace phos::image_test {
namespace {

using Kind = WireField::Kind;

// What a length-delimited field of image.proto is.
enum class Type { kProcess, kFiles, kGpu, kAllocation, kTimings, kRound, kPagesFile, kDeviceFile };

Kind kind_of(Type type, uint64_t number, Type* inner) {
  if (type == Type::kProcess) {
    *inner = number == 9    ? Type::kGpu
             : number == 10 ? Type::kAllocation
             : number == 11 ? Type::kTimings
             : number == 18 ? Type::kPagesFile
                            : Type::kRound;
    const bool is_message = (number >= 9 && number <= 11) || number == 17 || number == 18;
    return is_message ? Kind::kMessage : Kind::kBytes;
  }
  *inner = Type::kDeviceFile;
  if (type == Type::kFiles && number == 2) return Kind::kMessage;
  if (type == Type::kAllocation && number >= 8 && number <= 12) return Kind::kPacked;
  return Kind::kBytes;
}

struct Reader {
  const uint8_t* at;
  const uint8_t* end;

  std::optional<uint64_t> varint() {
    uint64_t value = 0;
    for (int shift = 0; shift < 64 && at < end; shift += 7) {
      const uint8_t byte = *at++;
      value |= uint64_t{byte & 0x7fu} << shift;
      if (!(byte & 0x80)) return value;
    }
    return {};
  }
};

WireMessage parse(Reader in, Type type) {
  WireMessage message;
  while (in.at < in.end) {
    auto key = in.varint();
    if (!key) break;
    WireField field;
    field.number = *key >> 3;
    if ((*key & 7) == 0) {
      auto value = in.varint();
      if (!value) break;
      field.value = *value;
    } else if ((*key & 7) == 2) {
      auto length = in.varint();
      if (!length || *length > static_cast<uint64_t>(in.end - in.at)) break;
      Reader inside{in.at, in.at + *length};
      in.at = inside.end;
      Type inner;
      field.kind = kind_of(type, field.number, &inner);
      if (field.kind == Kind::kMessage) {
        field.children = parse(inside, inner);
      } else if (field.kind == Kind::kBytes) {
        field.data.assign(inside.at, inside.end);
      } else {
        while (auto value = inside.varint()) {
          field.children.emplace_back();
          field.children.back().value = *value;
        }
      }
    } else {
      break;  // image.proto has no other types
    }
    message.push_back(std::move(field));
  }
  return message;
}

void put_varint(Bytes& out, uint64_t value) {
  for (; value >= 0x80; value >>= 7) out.push_back(static_cast<uint8_t>(value | 0x80));
  out.push_back(static_cast<uint8_t>(value));
}

void put_number(Bytes& out, uint64_t value, int bytes) {
  for (int i = 0; i < bytes; i++) out.push_back(static_cast<uint8_t>(value >> (8 * i)));
}

}  // namespace

WireMessage parse_payload(const Bytes& payload, uint32_t kind) {
  return parse({payload.data(), payload.data() + payload.size()},
               kind == 2 ? Type::kFiles : Type::kProcess);
}

Bytes serialise(const WireMessage& message) {
  Bytes out;
  for (const WireField& field : message) {
    const bool is_number = field.kind == Kind::kNumber;
    put_varint(out, field.number << 3 | (is_number ? 0 : 2));
    if (is_number) {
      put_varint(out, field.value);
      continue;
    }
    Bytes inside = field.data;
    if (field.kind == Kind::kMessage) inside = serialise(field.children);
    if (field.kind == Kind::kPacked) {
      for (const WireField& number : field.children) put_varint(inside, number.value);
    }
    put_varint(out, inside.size() + field.lie);
    out.insert(out.end(), inside.begin(), inside.end());
  }
  return out;
}

void for_each_field(WireMessage& message, const std::function<void(WireField&)>& call) {
  for (WireField& field : message) {
    call(field);
    for_each_field(field.children, call);
  }
}

Bytes seal_payload(const Bytes& payload, uint32_t kind, uint32_t version) {
  Bytes out = {'P', 'H', 'O', 'S', 'I', 'M', 'G', 0};
  put_number(out, version, 4);
  put_number(out, kind, 4);
  put_number(out, payload.size(), 8);
  put_number(out, crc32c(payload.data(), payload.size()), 4);
  put_number(out, crc32c(out.data(), out.size()), 4);
  out.insert(out.end(), payload.begin(), payload.end());
  return out;
}

Bytes seal_page_header(Bytes header) {
  header.resize(52);
  put_number(header, crc32c(header.data(), header.size()), 4);
  header.resize(65536);
  return header;
}

}  // namespace phos::image_test
