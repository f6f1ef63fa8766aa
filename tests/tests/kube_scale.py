"""Nodes of a large cluster, and their heartbeats. `create CA HOST FIRST LAST` makes Nodes of those numbers; `beat CA HOST
LAST SECONDS PERIOD` patches for so many seconds the status of one after the other, each once in a period, as far as the
API server keeps up, and prints the number of patches."""
import http.client, json, ssl, sys, threading, time
what, ca, host = sys.argv[1:4]
numbers = [int(word) for word in sys.argv[4:]]
tls = ssl.create_default_context(cafile=ca)
head = {"Authorization": "Bearer token-of-admin"}
done, lock = [0], threading.Lock()
images = [{"names": ["registry.example.com/team/program-%d@sha256:%064d" % (i, i)], "sizeBytes": i} for i in range(50)]
def condition(now):
    return [{"type": t, "status": s, "reason": "Kubelet" + t, "message": "kubelet says so", "lastHeartbeatTime": now,
             "lastTransitionTime": "2026-01-01T00:00:00Z"}
            for t, s in (("MemoryPressure", "False"), ("DiskPressure", "False"), ("PIDPressure", "False"), ("Ready", "True"))]
class Api:
    def __init__(self): self.connection = None
    def ask(self, method, path, body, kind):
        for attempt in range(5):
            try:
                if self.connection is None:
                    self.connection = http.client.HTTPSConnection(host, 6443, context=tls, timeout=60)
                self.connection.request(method, path, json.dumps(body), {**head, "Content-Type": kind})
                answer = self.connection.getresponse()
                text = answer.read()
                if answer.status < 300 or answer.status == 409:
                    return
                if answer.status != 429: sys.exit("%s %s: %d %s" % (method, path, answer.status, text[:300]))
                time.sleep(1)
            except (OSError, http.client.HTTPException):
                self.connection = None
        sys.exit("no answer to " + path)
def name(n): return "node-%04d" % n
def create(api, n):
    p = "flannel.alpha.coreos.com/"
    api.ask("POST", "/api/v1/nodes", {"apiVersion": "v1", "kind": "Node", "metadata": {"name": name(n), "annotations": {
        p + "backend-data": '{"VNI":1,"VtepMAC":"02:00:00:00:%02x:%02x"}' % (n >> 8, n & 255), p + "backend-type": "vxlan",
        p + "kube-subnet-manager": "true", p + "public-ip": "172.16.%d.%d" % (n >> 8, n & 255)}},
        "spec": {"podCIDR": "10.%d.%d.0/24" % (128 + (n >> 8), n & 255)}}, "application/json")
    api.ask("PATCH", "/api/v1/nodes/%s/status" % name(n), {"status": {"images": images, "conditions": condition("2026-01-01T00:00:00Z")}},
        "application/strategic-merge-patch+json")
def beat(api, n):
    now = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
    api.ask("PATCH", "/api/v1/nodes/%s/status" % name(n), {"status": {"conditions": condition(now)}}, "application/strategic-merge-patch+json")
THREADS = 16
def work(t):
    api = Api()
    if what == "create":
        first, last = numbers
        for n in range(first + t, last + 1, THREADS):
            create(api, n)
        return
    last, seconds, period = numbers
    turn = period * THREADS / last
    due = began + turn * t / THREADS
    n = 2 + t
    while due < began + seconds:
        time.sleep(max(0, due - time.time()))
        if time.time() >= began + seconds:
            return
        beat(api, n)
        with lock:
            done[0] += 1
        n = n + THREADS if n + THREADS <= last else 2 + t
        due += turn
failed = []
def run(t):
    try:
        work(t)
    except BaseException as error:
        failed.append(error)
began = time.time()
all_ = [threading.Thread(target=run, args=(t,)) for t in range(THREADS)]
for t in all_: t.start()
for t in all_: t.join()
if failed: sys.exit(str(failed[0]))
print(done[0])
