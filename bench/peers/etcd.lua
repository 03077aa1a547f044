-- wrk's part of the etcd benchmark: POST the bodies of a file, one after another, to one path.
-- Arguments: the path, the file with one request body a line.

local requests = {}
local at = 0

function init(args)
  wrk.method = "POST"
  wrk.headers["Content-Type"] = "application/json"
  for body in io.lines(args[2]) do
    requests[#requests + 1] = wrk.format("POST", args[1], nil, body)
  end
  -- A shuffled order, as the other load generators use.
  math.randomseed(1)
  for turn = #requests, 2, -1 do
    local other = math.random(turn)
    requests[turn], requests[other] = requests[other], requests[turn]
  end
end

function request()
  at = at % #requests + 1
  return requests[at]
end

function done(summary, latency, _)
  local errors = summary.errors
  local failed = errors.connect + errors.read + errors.write + errors.status + errors.timeout
  io.write(string.format("RESULT [%d,%d,%.1f,%.1f,%.1f,%d]\n", summary.requests, summary.duration,
    latency:percentile(50), latency:percentile(99), latency:percentile(99.9), failed))
end
