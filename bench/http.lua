-- wrk's part of `python -m bench http`. Arguments: `order` or `user`; a file with one customer a line (id, token);
-- for orders the sku of the one product, and what the Idempotency-Keys of this run begin with.
--
-- Everything but the Idempotency-Key is put together beforehand. Every answer's status is looked at.

local heads, tail = {}, "\r\n\r\n"
local at, sent, key_start = 0, 0, nil
expected, unexpected, first = 200, 0, ""
local threads = {}

function setup(thread)
  threads[#threads + 1] = thread
end

local function order(token, sku)
  local body = string.format('{"lines":[{"sku":"%s","quantity":1}]}', sku)
  tail = "\r\n\r\n" .. body
  return "POST /v1/orders HTTP/1.1\r\nHost: " .. wrk.headers["Host"] .. "\r\nAuthorization: Bearer " .. token
    .. "\r\nContent-Type: application/json\r\nContent-Length: " .. #body .. "\r\nIdempotency-Key: "
end

local function user(id, token)
  return "GET /user/" .. id .. " HTTP/1.1\r\nHost: " .. wrk.headers["Host"] .. "\r\nAuthorization: Bearer " .. token
end

function init(args)
  if args[1] == "order" then
    key_start, expected = args[4], 201
  end
  for line in io.lines(args[2]) do
    local id, token = line:match("^(%d+) (%S+)$")
    heads[#heads + 1] = key_start and order(token, args[3]) or user(id, token)
  end
  -- Not in the order in which the accounts were made.
  math.randomseed(1)
  for turn = #heads, 2, -1 do
    local other = math.random(turn)
    heads[turn], heads[other] = heads[other], heads[turn]
  end
end

function request()
  at = at % #heads + 1
  if key_start == nil then
    return heads[at] .. tail
  end
  sent = sent + 1
  return string.format("%s%s%012x%s", heads[at], key_start, sent, tail)
end

function response(status, headers, body)
  if status ~= expected or headers["Idempotent-Replayed"] ~= nil then
    unexpected = unexpected + 1
    if first == "" then
      first = status .. " " .. body:gsub("%s+", " "):sub(1, 400)
    end
  end
end

function done(summary, latency, _)
  local errors = summary.errors
  -- A status above 399 is counted as unexpected already.
  local failed = errors.connect + errors.read + errors.write + errors.timeout
  local refused = 0
  for _, thread in ipairs(threads) do
    refused = refused + thread:get("unexpected")
    if thread:get("first") ~= "" then
      io.write("UNEXPECTED ", thread:get("first"), "\n")
    end
  end
  io.write(string.format("RESULT [%d,%d,%.1f,%.1f,%.1f,%d,%d]\n", summary.requests, summary.duration,
    latency:percentile(50), latency:percentile(99), latency:percentile(99.9), failed, refused))
end
