// Tokens that some sequences have got: what a call for a batch is told.
#pragma once

#include <cstdint>

namespace evospec {

struct TokenRow {
  int32_t slot;          // of its session or text
  int32_t text;          // of a session, which goes on with the same tokens; -1: none
  int32_t tenant;        // table of its tenant; -1: none
  int32_t end;           // of its tokens, which begin where those of the row before end
  int32_t num_accepted;  // how many of them were drafted
  int32_t num_drafts;    // how many drafts were verified
};

struct TokenRows {
  int32_t count;
  const TokenRow* rows;
  const int32_t* all_tokens;

  int begin(int row) const { return row == 0 ? 0 : rows[row - 1].end; }
  int size(int row) const { return rows[row].end - begin(row); }
  const int32_t* tokens(int row) const { return all_tokens + begin(row); }
  int num_tokens() const { return begin(count); }
};

}  // namespace evospec
