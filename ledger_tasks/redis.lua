-- The tasks of one Redis namespace: a log of commits, and a document for each row that they made. Each operation is
-- one run of this script. A commit is written only if the log still ends where its writer stood, and then whole: what
-- Redis may refuse (no memory, a replica, a full disk) it refuses at the first write.
--
-- KEYS[1]  {ns}:tasks
-- ARGV     name of the operation, id of the ledger that the caller opened, schema that it knows, what the operation takes
--
-- Keys:
--
--   tasks             hash: schema, head (number of the newest commit), token (its), bytes (of the log)
--   tasks:turn        token of who came too late before: others leave it to that to be the next, as long as it is there
--   tasks:log         list of the newest commits, the last one is `head`; each a JSON list: its token, then table, key
--                     and row of what it changed (null: it is gone)
--   tasks:<table>     hash: primary key as a JSON list → row as a JSON object
--
-- Rows are text to this script. Rows of the tables that only grow are never written twice.

local operation, tasks = ARGV[1], KEYS[1]
local prefix, log, turn = string.sub(tasks, 1, -6), tasks .. ':log', tasks .. ':turn'

-- a server that came back empty must not look like a ledger in which nothing was ever done
if redis.call('HGET', prefix .. 'meta', 'id') ~= ARGV[2] then
  return 'replaced'
end

local schema, head, token, bytes = unpack(redis.call('HMGET', tasks, 'schema', 'head', 'token', 'bytes'))
if schema and tonumber(schema) > tonumber(ARGV[3]) then
  return {'newer', schema}
end
head, token, bytes = tonumber(head or 0), token or '', tonumber(bytes or 0)

local function server_time()
  local t = redis.call('TIME')
  return t[1] * 1000000 + t[2]
end

local function as_text(number)
  return string.format('%.0f', number)
end

-- milliseconds for which it is another's turn; if it is nobody's it is taken by whoever wants it
local function wait_for_turn(mine, millis)
  local holder = redis.call('GET', turn)
  if holder and holder ~= mine then return math.max(1, redis.call('PTTL', turn)) end
  if tonumber(millis) > 0 then redis.pcall('SET', turn, mine, 'PX', millis) end    -- nothing depends on it
  return 0
end

local function leave(mine)
  if redis.call('GET', turn) == mine then redis.call('DEL', turn) end
  return {'left'}
end

-- what came after a place: news or gone (some of it is not there any more), the time, how long to wait, the commits
local function news(number, its, mine, millis)
  number = tonumber(number)
  local now, wait = as_text(server_time()), wait_for_turn(mine, millis)
  if number == head and its == token then return {'news', now, wait, {}} end
  local found = number < head and redis.call('LRANGE', log, number - head - 1, -1) or {}
  if number > 0 and string.sub(found[1] or '', 3, 2 + #its) ~= its then    -- the place itself must be there
    return {'gone', now, wait, {}}
  end
  if number > 0 then table.remove(found, 1) end
  return {number + #found == head and 'news' or 'gone', now, wait, found}
end

-- number and token of the place, token, how many commits and bytes the log may have, names of the tables that only
-- grow; then table, key and row of each change
local function commit(number, its, mine, most, most_bytes, growing)
  if tonumber(number) ~= head or its ~= token then return news(number, its, mine, 0) end
  for i = 10, #ARGV, 3 do
    if string.find(growing, ' ' .. ARGV[i] .. ' ', 1, true)
      and redis.call('HEXISTS', tasks .. ':' .. ARGV[i], ARGV[i + 1]) == 1 then
      return {'there', ARGV[i], ARGV[i + 1]}
    end
  end
  redis.call('HSET', tasks, 'schema', ARGV[3], 'head', as_text(head + 1), 'token', mine)
  local entry = {'["' .. mine .. '"'}
  for i = 10, #ARGV, 3 do
    local documents, key, row = tasks .. ':' .. ARGV[i], ARGV[i + 1], ARGV[i + 2]
    if row == 'null' then
      redis.call('HDEL', documents, key)
    else
      redis.call('HSET', documents, key, row)
    end
    entry[#entry + 1] = '"' .. ARGV[i] .. '",' .. key .. ',' .. row
  end
  entry = table.concat(entry, ',') .. ']'
  local length = redis.call('RPUSH', log, entry)
  bytes = bytes + #entry
  while length > 1 and (length > tonumber(most) or bytes > tonumber(most_bytes)) do
    bytes, length = bytes - #redis.call('LPOP', log), length - 1
  end
  redis.call('HSET', tasks, 'bytes', as_text(bytes))
  leave(mine)
  return {'committed'}
end

-- some documents of a table from a cursor on: the next cursor, then the rows as one JSON list, which is one text to read
local function page(name, cursor, count)
  local found = redis.call('HSCAN', tasks .. ':' .. name, cursor, 'COUNT', count)
  local rows = {}
  for i = 2, #found[2], 2 do
    rows[i / 2] = found[2][i]
  end
  return {'page', found[1], '[' .. table.concat(rows, ',') .. ']'}
end

local function begin()
  return {'begin', as_text(head), token}
end

-- an error of the server keeps its code, which Redis 6 would bury in a text
local perform = ({news = news, commit = commit, leave = leave, page = page, begin = begin})[operation]
local ok, reply = pcall(perform, unpack(ARGV, 4, math.min(#ARGV, 9)))
if ok then return reply end
local told = type(reply) == 'table' and reply.err or reply
return redis.error_reply(string.match(told, '^@user_script: %d+: %-(.+)$') or told)
