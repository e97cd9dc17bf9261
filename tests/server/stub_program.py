"""Program of http_server_test: a server over a stub, in a process of its own.

Its arguments are --drain_seconds and the seconds of a step. It prints what a server says.
"""

import sys

from benchmarks.stub_scheduler import stub_service
from t5x_inference_ext.server.http_server import HttpServer, bind
from t5x_inference_ext.server.options import ServerOptions


def main(drain_seconds: str, seconds: str) -> None:
  options = ServerOptions(port=0, drain_seconds=int(drain_seconds))
  service = stub_service(options, seconds=float(seconds))
  HttpServer(service, lambda line: print(line, flush=True)).run([bind(options)])
  assert service.driver.close(5)
  service.log.close()


if __name__ == '__main__':
  main(*sys.argv[1:])
